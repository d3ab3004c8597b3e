"""What every policy owes, over the one list: the method itself, batches, text, positions, K/V, composition, pages."""

import copy

import pytest
import torch

from dyvte_engine import FixedExit, KeepAll, compose
from dyvte_engine.inputs.splice import reduce_pictures
from dyvte_engine.policies import POLICIES as NOTATIONS
from tests import tiny
from tests.policies import reference as ref
from tests.policies.shared import LAYERS, POLICIES, VISION, always_exit, build, prefill

every_policy = pytest.mark.parametrize("name", POLICIES)
every_tower = pytest.mark.parametrize("vision", VISION)


@pytest.fixture(scope="module")
def engines():
    return {vision: build(vision) for vision in VISION}


def run(engine, policy, texts, images, **options):
    engine.policy = policy
    return engine.generate(texts, images, chat=False, max_new_tokens=5, **options)


def check_against_plain(engine, hf, reference, texts, images, steps=3):
    """Logits, rows and positions of a batch, after the prompt and while decoding, against recomputation in HF."""
    entered = [ref.enter(hf, engine.model.processor, reference, t, i) for t, i in zip(texts, images)]
    new: list[list[int]] = [[] for _ in texts]
    with prefill(engine, texts, images) as running:
        rows = [[layer[b] for layer in running.rows] for b in range(len(texts))]
        for step in range(steps):
            assert running.positions.tolist() == [len(e) + step for e, _ in entered]
            for b, (embeds, visual) in enumerate(entered):
                want, want_rows = ref.logits(hf, reference, embeds, visual, new[b])
                torch.testing.assert_close(running.logits[b], want, rtol=2e-4, atol=2e-4)
                assert rows[b] == want_rows
                new[b].append(int(want.argmax()))
            running.step([tokens[-1] for tokens in new])
        pages = sum(-(-(n + steps) // 4) for row in rows for n in row)
        assert engine.pool.bytes_held == pages * engine.pool.page_bytes
    assert engine.pool.bytes_held == 0


@every_tower
@every_policy
def test_equals_the_plain_method(engines, name, vision):
    engine, hf = engines[vision]
    engine.policy, reference = POLICIES[name]
    texts, images = tiny.prompts(seed=5, n=4, images=(0, 1, 1, 2))
    check_against_plain(engine, hf, reference, texts, images)


@every_policy
def test_composes_with_exits(engines, name):
    engine, hf = engines["clip"]
    policy, reference = POLICIES[name]
    engine.policy = compose(policy, FixedExit(5))
    texts, images = tiny.prompts(seed=6, n=2, images=(1, 2))
    check_against_plain(engine, hf, ref.then_exit(reference, 5), texts, images, steps=2)
    fixed = run(engine, engine.policy, texts, images)
    dynamic = run(engine, compose(policy, always_exit(5)), texts, images)
    assert [r.token_ids for r in dynamic] == [r.token_ids for r in fixed]
    assert [r.stats.tokens_per_layer for r in dynamic] == [r.stats.tokens_per_layer for r in fixed]


@every_tower
@every_policy
def test_alone_as_in_a_batch(engines, name, vision):
    engine, _ = engines[vision]
    texts, images = tiny.prompts(seed=7, n=6)
    batch = run(engine, POLICIES[name][0], texts, images)
    for text, pictures, together in zip(texts, images, batch):
        alone = run(engine, POLICIES[name][0], [text], [pictures])[0]
        assert alone.token_ids == together.token_ids
        for figure in ("tokens_per_layer", "kv_bytes", "prefill_tflops", "exit_layer", "visual_tokens", "text_tokens"):
            assert getattr(alone.stats, figure) == getattr(together.stats, figure)


@every_policy
def test_text_passes_through(engines, name):
    engine, _ = engines["clip"]
    texts, images = tiny.prompts(seed=8, n=3, images=(0,))
    got, want = (run(engine, policy, texts, images) for policy in (POLICIES[name][0], KeepAll()))
    assert [r.token_ids for r in got] == [r.token_ids for r in want]
    assert [r.stats.tokens_per_layer for r in got] == [r.stats.tokens_per_layer for r in want]


@every_policy
def test_figures_count_from_the_whole_prompt(engines, name):
    engine, _ = engines["clip"]
    texts, images = tiny.prompts(seed=9, n=2, images=(1, 2))
    got, plain = (run(engine, policy, texts, images) for policy in (POLICIES[name][0], KeepAll()))
    for g, p in zip(got, plain):
        assert (g.stats.visual_tokens, g.stats.text_tokens) == (p.stats.visual_tokens, p.stats.text_tokens)
        for figure in ("prefill_tflops", "prefill_tflops_true", "kv_bytes"):
            assert getattr(g.stats, f"{figure}_keep_all") == pytest.approx(getattr(p.stats, figure))
            assert getattr(g.stats, figure) < getattr(p.stats, figure) or name == "keep-all"


@every_policy
def test_early_kv_can_go_and_every_page_comes_back(name):
    engine, _ = build(policy=POLICIES[name][0], drop_early_kv=True)
    texts, images = tiny.prompts(seed=10, n=5)
    with prefill(engine, texts, images) as running:
        assert (running.cache.host_lens == running.cache.host_lens[0]).all()
    assert engine.pool.bytes_held == 0
    chunks = engine.stream(texts, images, chat=False, max_new_tokens=5)
    next(chunks)
    assert engine.pool.bytes_held > 0
    chunks.close()
    assert engine.pool.bytes_held == 0


@pytest.fixture(scope="module")
def low_engines():
    """An engine of each 16-bit dtype, transformers' model in it, and the same weights in float64."""
    built = {dtype: build(dtype=dtype) for dtype in (torch.bfloat16, torch.float16)}
    return {dtype: (engine, hf, copy.deepcopy(hf).double()) for dtype, (engine, hf) in built.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_policy
def test_logits_error_is_at_most_twice_torchs(low_engines, engines, name, dtype):
    """In 16 bits, against float64 on the rows that the policy kept in 16 bits (a ranking may turn with the dtype)."""
    (engine, low, exact), texts, images = low_engines[dtype], *tiny.prompts(seed=11, n=6)
    engine.policy, renumber = POLICIES[name][0], POLICIES[name][1].renumber
    prompts = engine.model.prepare(engine.model.tokenize(texts, images), engine.policy)
    seen: list = []
    watch = lambda number, q, k, rows: seen.append(rows.source.split(rows.lengths.host))  # noqa: E731
    with engine.prefill_prepared(prompts, watch=watch) as running:
        logits, rows = running.logits, running.rows
    ours, theirs = [], []
    for b, prompt in enumerate(reduce_pictures(engine.policy, prompts)):
        present = [layer[b] - seen[0][b][0] for layer in seen]
        kept = ref.Reference(stay=lambda at, p=present: torch.isin(p[at.number], p[at.number + 1]), renumber=renumber)
        embeds = prompt.inputs_embeds
        want, want_rows = ref.logits(exact, kept, embeds.double(), prompt.visual, [])
        assert want_rows == [layer[b] for layer in rows]
        ours.append(logits[b].double() - want)
        theirs.append(ref.logits(low, kept, embeds, prompt.visual, [])[0].double() - want)
    assert torch.stack(ours).norm() <= 2 * torch.stack(theirs).norm()
    engines["clip"][0].policy = engine.policy
    with prefill(engines["clip"][0], texts, images) as running:
        assert running.rows == rows, "as many as in float32"


@pytest.mark.parametrize("name", ["divprune", "random", "downsample", "pyramiddrop"])
def test_lower_entry_takes_each_stretch_as_a_picture(engines, name):
    engine, hf = engines["clip"]
    engine.policy, reference = POLICIES[name]
    text, pictures = "w1 <image> w2 w3 <image> w4", tiny.prompts(seed=12, n=1, images=(2,))[1][0]
    embeds, visual, _ = tiny.embed(hf, engine.model.processor, text, pictures)
    entered = ref.enter(hf, engine.model.processor, reference, text, pictures)
    with engine.prefill(embeds, visual) as running:
        torch.testing.assert_close(running.logits[0], ref.logits(hf, reference, *entered, [])[0], rtol=2e-4, atol=2e-4)


@pytest.mark.gpu
@every_tower
@every_policy
def test_equals_the_cpu(name, vision):
    texts, images = tiny.prompts(seed=13, n=8)
    answers = [run(build(vision, device=device)[0], POLICIES[name][0], texts, images) for device in ("cpu", "cuda")]
    assert [r.token_ids for r in answers[0]] == [r.token_ids for r in answers[1]]
    assert [r.stats.tokens_per_layer for r in answers[0]] == [r.stats.tokens_per_layer for r in answers[1]]


def test_the_list_is_whole():
    assert set(NOTATIONS) <= set(POLICIES)
    assert LAYERS > 5
