"""Single methods on larger random inputs, and what their arguments and notation accept."""

from dataclasses import dataclass, replace

import pytest
import torch
import transformers

from dyvte_engine import (
    DivPrune,
    Downsample,
    FastV,
    FixedExit,
    InvalidArgumentError,
    KeepAll,
    ModelError,
    PyramidDrop,
    Random,
    ToMe,
    VisionZip,
    compose,
    search_vtw,
)
from dyvte_engine.flops import vision_flops
from dyvte_engine.inputs.splice import reduce_pictures
from dyvte_engine.kernels import ops
from dyvte_engine.models import PreparedPrompt
from dyvte_engine.models.rows import runs
from dyvte_engine.models.vision import VisionTower
from dyvte_engine.models.vision_run import VisionRun
from dyvte_engine.policies import parse
from dyvte_engine.policies.sums import add_rows
from dyvte_engine.policies.tome import match, merge_rows
from tests import tiny
from tests.policies import reference as ref
from tests.policies.shared import LAYERS, VISION, always_exit, build, prefill


@pytest.mark.parametrize(("size", "keep"), [(1, 0.098), (7, 0.5), (40, 0.098), (61, 0.4), (9, 1.0)])
def test_divprune_rows(size, keep):
    features = torch.randn(3, size, 12, generator=torch.Generator().manual_seed(size))
    got = DivPrune(keep).select(features)
    assert got.tolist() == [ref.divprune_rows(f, keep) or [0] for f in features]


def test_divprune_never_keeps_a_token_twice():
    features = torch.randn(4, 8).repeat_interleave(3, dim=0)[None]
    assert len(set(DivPrune(0.75).select(features)[0].tolist())) == 9


@pytest.mark.parametrize("has_class", [0, 1])
@pytest.mark.parametrize(("size", "r"), [(12, 2), (51, 20), (64, 31), (33, 16)])
def test_tome_matching(size, r, has_class):
    generator = torch.Generator().manual_seed(size + r)
    x, keys = torch.randn(2, size, 5, generator=generator), torch.randn(2, size, 7, generator=generator)
    stay, pairs = match(keys, r, has_class)
    weight = torch.ones(2, size, 1)
    sums = merge_rows(torch.cat((x, weight), dim=-1), stay, pairs)
    for b in range(2):
        want, members = ref.tome_merge(x[b], [[i] for i in range(size)], keys[b], r, bool(has_class))
        torch.testing.assert_close(sums[b, :, :-1] / sums[b, :, -1:], want)
        assert sums[b, :, -1].tolist() == [len(m) for m in members]
        assert members[0] == [0] or not has_class


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sums_do_not_depend_on_an_order(device):
    """Merged rows are the true sums, rounded once, whatever is added first; and on CUDA the same in every run."""
    generator = torch.Generator().manual_seed(0)
    base, rows = torch.randn(3, 7, 65, generator=generator), 1e6 * torch.randn(3, 500, 65, generator=generator)
    rows[:, 250:] = -rows[:, :250] + torch.randn(3, 250, 65, generator=generator)  # much of it cancels out
    target = torch.randint(6, (3, 250), generator=generator).repeat(1, 2)  # nothing joins the last
    want = base.double().scatter_add(1, target[..., None].expand_as(rows), rows.double()).float()
    base, rows, target = base.to(device), rows.to(device), target.to(device)
    got = [add_rows(base, target[:, order], rows[:, order]).cpu() for order in map(torch.randperm, [500] * 5)]
    for one in got:
        torch.testing.assert_close(one, want, rtol=1e-6, atol=1e-7)
    assert torch.equal(got[0][:, 6], base[:, 6].cpu())
    same = [add_rows(base, target, rows) for _ in range(20)]
    assert all(torch.equal(one, same[0]) for one in same)
    empty = add_rows(base, target[:, :0], rows[:, :0])
    assert torch.equal(empty, base)


def wide_model(vision: str):
    """100 patches, six blocks; features of the fifth."""
    config = tiny.model(vision=vision).config
    config.vision_config.image_size, config.vision_config.num_hidden_layers = 70, 6
    torch.manual_seed(1)
    hf = transformers.LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for weight in hf.model.vision_tower.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return hf


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("policy", [ToMe(0.5), ToMe(0.18), VisionZip(20, 6), VisionZip(1, 99), VisionZip(50, 0)])
def test_tower_policies_on_a_wider_tower(vision, policy):
    hf = wide_model(vision)
    tower = VisionTower.of(hf)
    model = type("Model", (), {"vision": tower})
    pixels = torch.randn(3, 3, 70, 70)
    with VisionRun(hf.model) as run:
        policy.bind(model).in_tower(tower, run)
        got = features_of(hf, pixels)
    for features, picture in zip(got, pixels):
        if isinstance(policy, ToMe):
            want = ref.tome_features(hf, picture[None], policy.keep)
        else:
            want = ref.visionzip_features(hf, picture[None], policy.dominant, policy.contextual)
        torch.testing.assert_close(features, hf.model.multi_modal_projector(want), rtol=1e-3, atol=1e-4)
    after = features_of(hf, pixels)
    assert after[0].shape[0] == 100, "the tower is as it was"


def features_of(hf, pixels: torch.Tensor) -> torch.Tensor:
    """[P, V', d], tower and projector called as LLaVA does."""
    out = hf.model.vision_tower(pixels, output_hidden_states=True).hidden_states[hf.config.vision_feature_layer]
    return hf.model.multi_modal_projector(out[:, 1:] if hf.config.vision_feature_select_strategy == "default" else out)


def test_flops_of_a_merging_tower():
    vision = wide_model("clip").config.vision_config
    d, m = vision.hidden_size, vision.intermediate_size
    total = 0
    for before, after in [(101, 91), (91, 71), (71, 71), (71, 71), (71, 71), (71, 71)]:
        total += 2 * 4 * before * d * d + 2 * 2 * before * before * d + 2 * 2 * after * d * m
    assert vision_flops(vision, (10, 20)) == total


def test_downsample_of_grids_that_do_not_divide():
    features = torch.randn(25, 6)
    torch.testing.assert_close(Downsample(2).reduce([features])[0], ref.downsample(features, 2))
    with pytest.raises(InvalidArgumentError, match="24 tokens"):
        Downsample(2).reduce([features[:24]])


@pytest.mark.parametrize("queries", ["last", "all"])
def test_fastv_scores_equal_eager_attention_maps(queries):
    """Over all rows; "last" as FastV calls the kernel, "all" with every row a query."""

    class Scores(KeepAll):
        def layers(self, num_layers):
            return set(range(num_layers - 1))

        def decide(self, state):
            cu = state.rows.lengths.cu
            q = state.q if queries == "all" else state.q[state.rows.last_rows]
            cu_q = cu if queries == "all" else torch.arange(len(cu), dtype=torch.int32)
            scores = ops.token_score(q, state.k, cu_q, cu, state.scale)
            seen.append(scores.split(state.rows.lengths.host))
            return [None] * len(state.rows.n_visual)

    seen: list = []
    engine, hf = build(policy=Scores())
    hf.set_attn_implementation("eager")
    texts, images = tiny.prompts(seed=14, n=3, images=(1, 2))
    prefill(engine, texts, images).close()
    for b, (text, pictures) in enumerate(zip(texts, images)):
        embeds, _, _ = tiny.embed(hf, engine.model.processor, text, pictures)
        with torch.no_grad():
            maps = hf.model.language_model(inputs_embeds=embeds[None], output_attentions=True).attentions
        for scores, attention in zip(seen, maps):
            want = attention[0].mean(0)[-1] if queries == "last" else attention[0].mean(dim=(0, 1))
            torch.testing.assert_close(scores[b], want, rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class Steps(KeepAll):
    """Every `step`-th visual token stays after layer 1; None: all do."""

    step: int | None

    def layers(self, num_layers):
        return {1}

    def decide(self, state):
        return [None if self.step is None else torch.arange(0, n, self.step) for n in state.rows.n_visual]


@pytest.mark.parametrize("steps", [(2, 3), (3, 2), (None, 2), (2, None), (3, 2, 5), (None, None)])
def test_policies_at_one_layer_keep_what_all_of_them_keep(steps):
    def stay(at):
        numbers = range(int(at.visual.sum()))
        chosen = ~at.visual
        kept = [n for n in numbers if all(step is None or n % step == 0 for step in steps)]
        chosen[at.visual.nonzero()[kept, 0]] = True
        return chosen if at.number == 1 else None

    engine, hf = build(policy=compose(*map(Steps, steps)))
    texts, images = tiny.prompts(seed=15, n=3, images=(1, 2))
    with prefill(engine, texts, images) as running:
        for b, entry in enumerate(zip(texts, images)):
            entered = ref.enter(hf, engine.model.processor, ref.Reference(), *entry)
            want, rows = ref.logits(hf, ref.Reference(stay=stay), *entered, [])
            assert [layer[b] for layer in running.rows] == rows
            torch.testing.assert_close(running.logits[b], want, rtol=2e-4, atol=2e-4)


def test_only_sequences_that_lose_tokens_are_numbered_anew():
    """Beside a prompt whose tokens leave, one without pictures keeps the gaps in its positions."""
    engine, hf = build(policy=PyramidDrop(renumber=True))
    text, pictures = tiny.prompts(seed=16, n=1, images=(2,))
    pictured, visual, _ = tiny.embed(hf, engine.model.processor, text[0], pictures[0])
    words, none, _ = tiny.embed(hf, engine.model.processor, "w1 w2 w3 w4 w5", [])
    gaps = torch.arange(len(words)) * 7 + 3
    want = tiny.masked_logits(hf, words, tiny.see_all(len(words)), gaps)[-1]
    near = tiny.masked_logits(hf, words, tiny.see_all(len(words)))[-1]
    assert not torch.allclose(want, near, atol=1e-2)
    with engine.prefill([pictured, words], [visual, none], [torch.arange(len(pictured)), gaps]) as running:
        assert running.rows[-1][0] < running.rows[0][0]
        torch.testing.assert_close(running.logits[1], want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("drop_early_kv", [False, True])
def test_heads_are_not_asked_after_the_last_layer(drop_early_kv):
    """Nothing follows it: heads that would fire there alone change nothing, whatever becomes of the early K/V."""
    policy = always_exit(LAYERS - 1)
    assert policy.layers(LAYERS) == set()
    thresholds = [1.0] * (LAYERS - 1) + [0.0]
    texts, images = tiny.prompts(seed=17, n=4, images=(1, 2))
    want, asked, every_second = (
        build(policy=chosen, drop_early_kv=drop_early_kv)[0].generate(texts, images, chat=False, max_new_tokens=5)
        for chosen in (KeepAll(), replace(policy, min_layer=0, threshold=thresholds), replace(policy, every_k=2))
    )
    for got in (asked, every_second):
        assert [r.token_ids for r in got] == [r.token_ids for r in want]
        assert all(r.stats.exit_layer is None for r in got)
        assert [r.stats.kv_bytes for r in got] == [r.stats.kv_bytes for r in want]


def test_a_prefill_that_fails_gives_its_pages_back():
    class Stumbling(Steps):
        def decide(self, state):
            assert engine.pool.bytes_held > 0
            raise ZeroDivisionError

    engine, _ = build(policy=Stumbling(2))
    texts, images = tiny.prompts(seed=18, n=2, images=(1,))
    with pytest.raises(ZeroDivisionError):
        engine.generate(texts, images, chat=False)
    assert engine.pool.bytes_held == 0
    engine.policy = KeepAll()
    engine.generate(texts, images, chat=False, max_new_tokens=2)
    assert engine.pool.bytes_held == 0


def test_random_is_uniform_and_repeatable():
    draws = torch.stack([torch.isin(torch.arange(20), Random(0, 0.3, seed).select(20)) for seed in range(400)])
    assert (draws.sum(1) == 14).all()
    assert ((draws.float().mean(0) - 0.7).abs() < 5 * (0.7 * 0.3 / 400) ** 0.5).all()
    assert Random(0, 0.3, 7).select(20).tolist() == ref.random_rows(20, 0.3, 7)


@pytest.mark.parametrize("place", range(4))
def test_random_takes_its_share_before_the_layer_it_names(place):
    engine, _ = build(policy=Random(place, 0.5))
    stats = engine.generate(*tiny.prompts(seed=5, n=1, images=(1,)), chat=False, max_new_tokens=1)[0].stats
    before, after = stats.text_tokens + tiny.VISUAL_TOKENS, stats.text_tokens + tiny.VISUAL_TOKENS // 2
    assert stats.tokens_per_layer == [before] * place + [after] * (LAYERS - place)


def test_pictures_are_replaced_where_they_stand():
    class Halve(KeepAll):
        def reduce(self, features):
            return [f[::2] for f in features]

    visual = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
    assert runs(visual) == [3, 2]
    embeds, text = torch.arange(9.0)[:, None], torch.ones(2, 1)
    with_pictures = PreparedPrompt(embeds, visual, torch.arange(3, 12), [3, 2])
    plain = PreparedPrompt(text, torch.zeros(2, dtype=torch.bool), torch.arange(2), [])
    short, same = reduce_pictures(Halve(), [with_pictures, plain])
    assert short.inputs_embeds.flatten().tolist() == [0, 1, 3, 4, 5, 6, 8] and same is plain
    assert short.visual.int().tolist() == [0, 1, 1, 0, 0, 1, 0]
    assert short.positions.tolist() == [3, 4, 5, 6, 7, 8, 9] and short.pictures == [2, 1]


def test_a_prompt_of_nothing_but_pictures_keeps_a_row():
    class Nothing(KeepAll):
        def reduce(self, features):
            return [f[:0] for f in features]

    some, all_visual = (
        PreparedPrompt(torch.ones(2, 1), torch.tensor([True, False]), torch.arange(2), [1]),
        torch.ones(2),
    )
    assert len(reduce_pictures(Nothing(), [some])[0].inputs_embeds) == 1
    bare = PreparedPrompt(torch.ones(2, 1), all_visual.bool(), torch.arange(2), [2])
    with pytest.raises(InvalidArgumentError, match="Nothing leaves nothing of a prompt; accepted: at least one row"):
        reduce_pictures(Nothing(), [some, bare])


def test_vtw_finds_the_first_layer_that_changes_little():
    engine, hf = build(max_batch=3)
    before = engine.policy
    texts, images = tiny.prompts(seed=3, n=5, images=(0, 1, 2))
    kl = dict.fromkeys(range(2, LAYERS), 0.0)
    for text, pictures in zip(texts, images):
        embeds, visual = ref.enter(hf, engine.model.processor, ref.Reference(), text, pictures)
        full = ref.logits(hf, ref.Reference(), embeds, visual, [])[0].softmax(-1)
        for k in kl:
            gone = ref.logits(hf, ref.then_exit(ref.Reference(), k - 1), embeds, visual, [])[0].softmax(-1)
            kl[k] += sum(g * (g / f).log() for f, g in zip(full.tolist(), gone)).item() / len(texts)
    for eta in sorted(kl.values()):
        want = next(k for k in kl if kl[k] <= eta * 1.001)
        got = search_vtw(engine, texts, images, eta=eta * 1.001, first=2, chat=False)
        assert got == FixedExit(want - 1)
    assert search_vtw(engine, texts, images, eta=0, first=2, chat=False) == FixedExit(LAYERS - 1)
    assert engine.policy is before
    with pytest.raises(InvalidArgumentError, match="first is 9"):
        search_vtw(engine, texts, images, first=9, chat=False)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("pyramiddrop", PyramidDrop((0.5, 0.25, 0.125))),  # without numbers: those of the authors' code
        ("divprune", DivPrune(0.098)),
        ("divprune:0.2", DivPrune(0.2)),
        ("visionzip", VisionZip(54, 10)),
        ("visionzip:108,20", VisionZip(108, 20)),
        ("tome", ToMe(0.5)),
        ("tome:0.25", ToMe(0.25)),
        ("random", Random(0, 0.5, 0)),
        ("random:2,0.75", Random(2, 0.75)),
        ("downsample", Downsample(2)),
        ("downsample:3", Downsample(3)),
        ("fastv", FastV(2, 0.5, "last")),
    ],
)
def test_notation(text, policy):
    assert parse(text) == policy
    assert parse(f"{text} + fixed:3").parts == (policy, FixedExit(3))


@pytest.mark.parametrize("text", ["fixed", "tome:a", "tome:0", "pyramiddrop:1", "random:0,2", "vtw", "visionzip:0,1"])
def test_notation_refused(text):
    with pytest.raises(InvalidArgumentError, match="accepted"):
        parse(text)


def test_what_does_not_fit_the_model_is_refused_at_once():
    engine, _ = build()
    refused = [VisionZip(10, 7), ToMe(0.05), Random(LAYERS), compose(FastV(1), VisionZip(16, 1))]
    for policy in refused:
        with pytest.raises(InvalidArgumentError, match="accepted"):
            engine.policy = policy
    with pytest.raises(InvalidArgumentError, match="one policy in the tower"):
        compose(ToMe(), VisionZip())


@pytest.mark.parametrize(("layer", "strategy"), [([1, 2], "default"), (-2, "full"), (0, "default")])
def test_features_that_tower_policies_cannot_follow_are_refused(layer, strategy):
    hf = tiny.model()
    hf.config.vision_feature_layer, hf.config.vision_feature_select_strategy = layer, strategy
    with pytest.raises(ModelError, match="accepted here"):
        VisionTower.of(hf)
