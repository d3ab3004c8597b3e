"""hf is a guest in its user's process: other threads, modes, gradients, copies and files stay as they are."""

import copy
import functools
import gc
import io
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dyvte_engine import FixedExit, InvalidArgumentError, KeepAll, hf
from tests import tiny
from tests.families import oracle, zoo
from tests.families.test_hf import Recorder

OPTIONS = dict(do_sample=False, max_new_tokens=6)
HOOK = dict(OPTIONS, custom_generate=hf.generate)


def inputs_of(seed=170, images=(1, 2)):
    texts, pictures = zoo.prompts("llava", seed=seed, n=1, images=images)
    return zoo.encode("llava", texts[0], pictures[0])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
def test_threads_with_policies_of_their_own(family):
    """Four threads generate with one model while a fifth calls its forward; nothing is shared but the weights."""
    model, twin = zoo.model(family), zoo.model(family)
    texts, images = zoo.prompts(family, seed=171, n=6, images=(1, 2))
    alone = [zoo.encode(family, t, i) for t, i in zip(texts, images)]
    policies = [FixedExit(0), FixedExit(1), FixedExit(2), None]
    rules = [oracle.fixed(0), oracle.fixed(1), oracle.fixed(2), None]
    plain = [twin(**a).logits for a in alone]
    want = [
        [
            oracle.generate(twin, a, 6) if rule is None else oracle.greedy(twin, oracle.enter(twin, a), rule, 6)[0]
            for a in alone
        ]
        for rule in rules
    ]
    before = dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    state, stop, wrong = hf.enable(model, FixedExit(0), max_len=384), threading.Event(), []

    def forward():
        while not stop.is_set():
            for one, logits in zip(alone, plain):
                torch.testing.assert_close(model(**one).logits, logits, rtol=1e-4, atol=1e-4)

    def answers(policy):
        keep = KeepAll() if policy is None else policy
        out = []
        for one in alone:
            ids = model.generate(**one, **OPTIONS, policy=keep)
            out.append(ids[0, one["input_ids"].shape[1] :].tolist())
            wrong.extend([] if state.exit_layers == [getattr(policy, "layer", None)] else [state.exit_layers])
        return out

    with ThreadPoolExecutor(5) as pool:
        watcher = pool.submit(forward)
        try:
            got = list(pool.map(answers, policies))
        finally:
            stop.set()
        watcher.result()
    assert got == want
    assert not wrong and state.policy == FixedExit(0)
    kept = {name: f for name, f in ALL_ATTENTION_FUNCTIONS._global_mapping.items() if name in before}
    assert kept == before
    assert not any("dyvte_engine" in m.forward.__code__.co_filename for m in model.modules())


@pytest.mark.parametrize("training", [False, True])
def test_a_call_leaves_no_trace(training):
    model, inputs = zoo.model("llava"), inputs_of()
    model.train(training)
    model.model.vision_tower.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    names, values = set(vars(model)), {n: t.clone() for n, t in model.state_dict().items()}
    with torch.inference_mode():
        answer = model.generate(**inputs, **HOOK, policy=FixedExit(1))
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    assert set(vars(model)) == names
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
    assert torch.equal(model.generate(**inputs, **HOOK, policy=FixedExit(1)), answer), "outside inference_mode too"
    twin = copy.deepcopy(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.lm_head.weight.grad is not None
    assert torch.equal(twin.generate(**inputs, **HOOK, policy=FixedExit(1)), answer)


def stored(model):
    """What transformers' own forward leaves in some releases cannot be pickled: so before one has run."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_copies_and_files_of_an_enabled_model_are_transformers():
    model, inputs = zoo.model("llava"), inputs_of()
    hf.enable(model, FixedExit(0))
    again = stored(model)
    want = zoo.model("llava").generate(**inputs, **OPTIONS)
    exited = model.generate(**inputs, **OPTIONS)
    assert not torch.equal(exited, want)
    for other in (again, copy.deepcopy(model)):
        assert torch.equal(other.generate(**inputs, **OPTIONS), want)
    assert torch.equal(model.generate(**inputs, **OPTIONS), exited)


def test_disable_brings_back_what_was_there():
    model, inputs = zoo.model("llava").train(), inputs_of()
    model.requires_grad_(True)
    mine = functools.partial(type(model).generate, model, max_new_tokens=1)
    model.generate = mine
    hf.enable(model)
    hf.enable(model, FixedExit(1))
    model.generate(**inputs, **OPTIONS)
    hf.disable(model)
    assert model.generate is mine and model.training and all(p.requires_grad for p in model.parameters())
    del model.generate
    hf.disable(model)
    assert "generate" not in vars(model)


def test_the_first_batch_binds_nobody():
    model, twin = zoo.model("llava"), zoo.model("llava")
    for n in (1, 3, 2, 11):
        texts, images = zoo.prompts("llava", seed=180 + n, n=n, images=(1,))
        batch = zoo.encode_batch("llava", texts, images)
        assert torch.equal(model.generate(**batch, **HOOK), twin.generate(**batch, **OPTIONS))


@pytest.mark.parametrize("enabled", [False, True])
def test_a_model_can_go(enabled):
    model, inputs = zoo.model("llava"), inputs_of()
    state = hf.enable(model) if enabled else None
    model.generate(**inputs, **HOOK)
    gone = weakref.ref(model)
    del model, state
    gc.collect()
    assert gone() is None


def names_of_the_cache(model):
    import inspect

    return [n for n in ("cache", "past_key_values") if n in inspect.signature(model.model.forward).parameters]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_filled_cache_is_refused(name):
    model, inputs = zoo.model("llava"), inputs_of()
    if name not in {"past_key_values", *names_of_the_cache(model)}:
        pytest.skip("not a name of this release")
    state = hf.enable(model)
    filled = transformers.DynamicCache()
    model(**inputs, **{name: filled}, use_cache=True)
    assert filled.get_seq_length() > 0
    ids = torch.cat((inputs["input_ids"], torch.tensor([[7, 8]])), dim=1)
    with pytest.raises(InvalidArgumentError, match="holds tokens; accepted: an empty cache"):
        model.generate(input_ids=ids, **{name: filled}, max_new_tokens=2)
    want = zoo.model("llava").generate(**inputs, **OPTIONS)
    empty = transformers.DynamicCache()
    assert torch.equal(model.generate(**inputs, **OPTIONS, **{name: empty}), want)
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, **OPTIONS, cache_implementation="static"), want)
    again = zoo.encode_batch("llava", *zoo.prompts("llava", seed=173, n=2, images=(1,)))
    assert model.generate(**again, **OPTIONS, cache_implementation="static").shape[0] == 2
    hf.disable(model)
    assert torch.equal(model.generate(**inputs, **OPTIONS, cache_implementation="static"), want)
    state = hf.enable(model)
    assert state.engine.pool.bytes_held == 0


def test_what_the_forward_does_not_take_is_refused():
    model, inputs = zoo.model("llava"), inputs_of()
    pairs = ((torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16)),)
    given = (
        transformers.LogitsProcessorList(),
        transformers.StoppingCriteriaList(),
        transformers.GenerationConfig(max_length=200),
    )
    for extra, words in [
        ({"kv": pairs}, "kv holds tokens"),
        ({"whatever": 3}, "whatever is given"),
        ({"inputs_embeds": torch.ones(1, 3, 64)}, "inputs_embeds is given"),
    ]:
        with pytest.raises(InvalidArgumentError, match=words):
            hf.generate(model, inputs["input_ids"], *given, **extra)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(InvalidArgumentError, match="inputs_embeds is given"):
        model.generate(inputs_embeds=embeds, **HOOK)


@pytest.mark.parametrize("enabled", [False, True])
def test_synced_gpus_are_refused(enabled):
    model, inputs = zoo.model("llava"), inputs_of()
    if enabled:
        hf.enable(model)
    with pytest.raises(InvalidArgumentError, match="synced_gpus is True"):
        model.generate(**inputs, **HOOK, synced_gpus=True)


def test_a_streamer_is_found_through_other_functions_of_that_name():
    model, inputs, recorder = zoo.model("llava"), inputs_of(), Recorder()

    def generate(*args, streamer=None, **kwargs):
        return hf.generate(*args, **kwargs)

    ids = model.generate(**inputs, **OPTIONS, custom_generate=generate, streamer=recorder)
    assert recorder.ended and [t for put in recorder.seen for t in put] == ids[0].tolist()


def test_stop_strings():
    model, twin, processor = tiny.model(), tiny.model(), tiny.processor()  # whose tokenizer stop strings work with
    tokenizer, picture = processor.tokenizer, tiny.picture(random.Random(3))
    inputs = processor(text="w1 <image> w2 w3", images=[picture], return_tensors="pt")
    n = inputs["input_ids"].shape[1]
    word = tokenizer.decode(twin.generate(**inputs, **OPTIONS)[0, n + 2])
    want = twin.generate(**inputs, **OPTIONS, stop_strings=[word], tokenizer=tokenizer)
    assert want.shape[1] < n + 6
    hook = functools.partial(hf.generate, tokenizer=tokenizer)
    assert torch.equal(model.generate(**inputs, **OPTIONS, custom_generate=hook, stop_strings=[word]), want)
    with pytest.raises(InvalidArgumentError, match=r"stop_strings is .* without a tokenizer"):
        model.generate(**inputs, **HOOK, stop_strings=[word])
    hf.enable(model)
    assert torch.equal(model.generate(**inputs, **OPTIONS, stop_strings=word, tokenizer=tokenizer), want)
    config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, stop_strings=[word])
    got = model.generate(**inputs, generation_config=config, tokenizer=tokenizer)
    assert torch.equal(got, want) and config.stop_strings == [word]


def test_a_pipelines_stop_sequence():
    picture, answers = tiny.picture(random.Random(4)), []
    free = transformers.pipeline("image-text-to-text", model=tiny.model(), processor=tiny.processor())
    options = dict(max_new_tokens=6, do_sample=False)
    given = dict(text="w1 <image> w2 w3", images=[picture], return_full_text=False)
    word = free(**given, generate_kwargs=options)[0]["generated_text"].split()[2]
    for enabled in (True, False):
        model = tiny.model()
        if enabled:
            hf.enable(model)
        pipe = transformers.pipeline("image-text-to-text", model=model, processor=tiny.processor())
        answers.append(pipe(**given, generate_kwargs=options, stop_sequence=word)[0]["generated_text"])
    assert answers[0] == answers[1] and len(answers[0].split()) < 6
