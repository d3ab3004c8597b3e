"""transformers' own generate, pipelines, streamers and criteria, with the exit inside."""

import random

import pytest
import torch
import transformers

from dyvte_engine import FixedExit, InvalidArgumentError, KeepAll, ModelError, Random, ToMe, hf
from tests.families import oracle, zoo
from tests.families.test_families import each_family

_pairs: dict[str, tuple] = {}


@pytest.fixture
def pair(family):
    """A model with the exit enabled, and an untouched twin."""
    if family not in _pairs:
        model = zoo.model(family)
        _pairs[family] = model, zoo.model(family), hf.enable(model, max_len=384)
    model, twin, state = _pairs[family]
    state.policy = KeepAll()
    yield model, twin, state
    assert state.engine.pool.bytes_held == 0


@pytest.mark.feature("transformers' generate")
@each_family
def test_generate_is_generate(family, pair):
    """One prompt at a time, and a left-padded batch, under KeepAll and with an exit."""
    model, twin, state = pair
    texts, images = zoo.prompts(family, seed=70, n=6, images=(1, 2))
    alone = [zoo.encode(family, t, i) for t, i in zip(texts, images)]
    assert [oracle.generate(model, e, 6) for e in alone] == [oracle.generate(twin, e, 6) for e in alone]
    batch = zoo.encode_batch(family, texts, images)
    options = dict(max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**batch, **options), twin.generate(**batch, **options))
    state.policy = FixedExit(1)
    out = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, encoded in zip(out.tolist(), alone):
        want, _ = oracle.greedy(twin, oracle.enter(twin, encoded), oracle.fixed(1), 6)
        assert row == want + [0] * (6 - len(want))
    assert state.exit_layers == [1] * 6


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_the_hook_takes_a_policy(family):
    model, twin = zoo.model(family), zoo.model(family)
    texts, images = zoo.prompts(family, seed=71, n=1, images=(2,))
    inputs = zoo.encode(family, texts[0], images[0])
    options = dict(max_new_tokens=6, do_sample=False, custom_generate=hf.generate)
    n = inputs["input_ids"].shape[1]
    assert model.generate(**inputs, **options)[0, n:].tolist() == oracle.generate(twin, inputs, 6)
    exited = model.generate(**inputs, **options, policy=FixedExit(0))[0, n:].tolist()
    assert exited == oracle.greedy(twin, oracle.enter(twin, inputs), oracle.fixed(0), 6)[0]
    assert model.generate(**inputs, **options)[0, n:].tolist() == oracle.generate(twin, inputs, 6)
    assert model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, n:].tolist() == oracle.generate(
        twin, inputs, 6
    )


class Recorder(transformers.generation.streamers.BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen.append(value.flatten().tolist())

    def end(self):
        self.ended = True


class NoToken(transformers.LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores[:, self.token] = -torch.inf
        return scores


class AfterToken(transformers.StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("family", ["llava"])
@pytest.mark.parametrize("seed", range(3))
def test_sampling_criteria_processors_streamers_and_scores(family, pair, seed):
    model, twin, _ = pair
    texts, images = zoo.prompts(family, seed=80 + seed, n=1 if seed == 0 else 4, images=(1, 2))
    batch = zoo.encode_batch(family, texts, images)
    free = twin.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
    options = dict(
        max_new_tokens=8,
        do_sample=seed == 2,
        temperature=1.5 if seed == 2 else None,
        repetition_penalty=1.3,
        logits_processor=transformers.LogitsProcessorList([NoToken(int(free[0, 0]))]),
        stopping_criteria=transformers.StoppingCriteriaList([AfterToken(int(free[-1, 2]))]),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    results, recorders = [], []
    for one in (model, twin):
        torch.manual_seed(seed)
        recorders.append(Recorder() if seed == 0 else None)
        results.append(one.generate(**batch, **options, streamer=recorders[-1]))
    ours, theirs = results
    assert torch.equal(ours.sequences, theirs.sequences)
    ends = torch.isin(theirs.sequences[:, batch["input_ids"].shape[1] :], torch.tensor([2, int(free[-1, 2])]))
    for name in ("scores", "logits"):
        got, want = getattr(ours, name), getattr(theirs, name)
        assert len(got) == len(want) == ends.shape[1] > 2
        for step, (g, w) in enumerate(zip(got, want)):
            runs = ~ends[:, :step].any(1)  # transformers goes on with padding where a prompt has ended
            torch.testing.assert_close(g[runs], w[runs], rtol=1e-4, atol=1e-4)
    if seed == 0:
        assert recorders[0].seen == recorders[1].seen and recorders[0].ended


@pytest.mark.parametrize("family", ["llava"])
def test_a_pipeline(family, pair):
    model, twin, state = pair
    answers = []
    for one in (model, twin):
        pipe = transformers.pipeline("image-text-to-text", model=one, processor=zoo.processor(family))
        picture = zoo.picture(random.Random(4))
        out = pipe(text="w1 <image> w2 w3", images=[picture], max_new_tokens=6, do_sample=False)
        answers.append(out[0]["generated_text"])
    assert answers[0] == answers[1]
    assert state.exit_layers == [None]


@pytest.mark.parametrize("family", ["llava"])
def test_what_is_refused(family, pair):
    model, _, state = pair
    texts, images = zoo.prompts(family, seed=90, n=9, images=(1,))
    inputs = zoo.encode(family, texts[0], images[0])
    for options, words in [
        ({"num_beams": 2}, "beam_search"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
        ({"max_new_tokens": 380}, "max_len 384"),
        ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
    ]:
        with pytest.raises(InvalidArgumentError, match=words):
            model.generate(**inputs, **{"max_new_tokens": 4, **options})
    with pytest.raises(InvalidArgumentError, match="9 prompts; accepted: max_batch 8"):
        model.generate(**zoo.encode_batch(family, texts, images), max_new_tokens=2)
    right = zoo.encode_batch(family, texts[:3], images[:3], side="right")
    with pytest.raises(InvalidArgumentError, match="not padded on the left"):
        model.generate(**right, max_new_tokens=2)
    for policy in (ToMe(0.5),):
        with pytest.raises(InvalidArgumentError, match="acts in the vision tower"):
            state.policy = policy
        with pytest.raises(InvalidArgumentError, match="acts in the vision tower"):
            model.generate(**inputs, max_new_tokens=2, policy=policy)
    with pytest.raises(ModelError, match="not supported"):
        hf.enable(transformers.AutoModelForCausalLM.from_config(zoo.text("llama")))
    assert isinstance(state.policy, KeepAll)


def test_disable_and_moving():
    model, twin = zoo.model("llava"), zoo.model("llava")
    state = hf.enable(model, Random(1, 0.5), max_len=128)
    texts, images = zoo.prompts("llava", seed=91, n=1, images=(1,))
    inputs = zoo.encode("llava", texts[0], images[0])
    model.generate(**inputs, max_new_tokens=2)
    assert state.exit_layers == [None]
    model.to(torch.float64)
    with pytest.raises(InvalidArgumentError, match=r"model is torch\.float64"):
        model.generate(**inputs, max_new_tokens=2)
    model.to(torch.float32)
    model.generate(**inputs, max_new_tokens=2)
    hf.disable(model)
    assert oracle.generate(model, inputs, 4) == oracle.generate(twin, inputs, 4)
    assert "generate" not in vars(model)
