"""Streamed statistics against transformers' eager attention maps, and the memory they take."""

import numpy as np
import pytest
import torch
from torch.autograd.profiler import profile

from dyvte_engine import Engine, EngineConfig, FixedExit, InvalidArgumentError, KeepAll
from dyvte_engine.analysis import attention
from dyvte_engine.analysis.attention import FIELDS, AttentionWatch, layer_statistics
from dyvte_engine.eval.lines import LineFile
from dyvte_engine.eval.run import SHORT
from dyvte_engine.eval.task import Sample
from dyvte_engine.models import VisionLanguageModel
from tests import tiny
from tests.analysis.eager import reduced
from tests.engine.conftest import build
from tests.families import oracle, zoo

CLOSE = dict(rtol=2e-4, atol=2e-5)  # fp32 through a few layers, as the engine's own tests compare logits


def watched(engine, texts, images, policy):
    """f64 [B, L, FIELDS] of prompts of raw text, as the engine sees them."""
    engine.policy = policy
    watch = AttentionWatch(engine.model.decoder.scale)
    engine.prefill_prepared(engine.prepare(texts, images, chat=False), watch=watch).close()
    return watch.table


@torch.no_grad()
@pytest.mark.parametrize("decoder", tiny.DECODERS)
def test_without_exit_they_are_those_of_output_attentions(decoder):
    """All layers, in a batch of prompts with one to three pictures; grouped-query heads in four of the five."""
    engine, hf = build(decoder)
    hf.set_attn_implementation("eager")
    texts, images = tiny.prompts(seed=3, n=6, images=(1, 2, 3))
    got = watched(engine, texts, images, KeepAll())
    for table, text, pictures in zip(got, texts, images):
        inputs = engine.model.processor(text=[text], images=pictures, return_tensors="pt")
        maps = hf(**inputs, output_attentions=True).attentions
        visual = inputs["input_ids"][0] == 4
        tail = len(visual) - 1 - int(visual.nonzero()[-1])
        want = [reduced(m[0], visual, tail) for m in maps]
        torch.testing.assert_close(torch.tensor(table), torch.tensor(want, dtype=torch.float64), **CLOSE)
        assert np.ptp(table[:, FIELDS.index("w_cross")]) > 0.02, "the layers hardly differ: this compares nothing"


_engines = {}


def family_engine(family):
    if family not in _engines:
        config = EngineConfig(torch.device("cpu"), torch.float32, max_len=384)
        loaded = VisionLanguageModel(zoo.model(family), zoo.processor(family), family, config.max_len)
        _engines[family] = Engine(loaded, config), zoo.model(family)
    return _engines[family]


@pytest.mark.parametrize("exit_layer", [None, 0, 1, zoo.LAYERS - 2])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_with_and_without_an_exit(family, exit_layer):
    """After an exit the visual columns are masked in transformers' own layers and left out of the maps."""
    engine, hf = family_engine(family)
    texts, images = zoo.prompts(family, seed=8, n=4, images=(1, 2))
    got = watched(engine, texts, images, KeepAll() if exit_layer is None else FixedExit(exit_layer))
    for table, words, pictures in zip(got, texts, images):
        entry = oracle.enter(hf, zoo.encode(family, words, pictures))
        want = eager_tables(hf, entry, exit_layer)
        torch.testing.assert_close(
            torch.tensor(table), torch.tensor(want, dtype=torch.float64), equal_nan=True, **CLOSE
        )


@torch.no_grad()
def eager_tables(hf, entry, exit_layer):
    decoder = oracle._decoder(hf)
    hf.set_attn_implementation("eager")
    at = entry.positions
    rotation = decoder.rotary_emb(entry.embeds[None], at[:, None] if at.dim() == 2 else at[None])
    tail = len(entry.visual) - 1 - int(entry.visual.nonzero()[-1])
    hidden, gone, rows = entry.embeds[None], torch.zeros_like(entry.visual), []
    for number, layer in enumerate(decoder.layers):
        hidden, maps = oracle._layer(layer, hidden, gone, rotation)
        if number < len(entry.deepstack):
            hidden[:, entry.visual] = hidden[:, entry.visual] + entry.deepstack[number]
        present = ~gone
        rows.append(reduced(maps[:, present][:, :, present], entry.visual[present], tail))
        if number == exit_layer:
            gone = entry.visual
    return rows


def test_before_the_first_layer_no_family_sees_a_picture():
    """FixedExit(-1) in a model with positions of three axes and deepstack: the text alone, at its own positions."""
    engine, hf = family_engine("qwen3_vl")
    texts, images = zoo.prompts("qwen3_vl", seed=8, n=3, images=(1, 2))
    engine.policy = FixedExit(-1)
    results = engine.generate(texts, images, chat=False, max_new_tokens=5)
    for words, pictures, result in zip(texts, images, results):
        entry = oracle.enter(hf, zoo.encode("qwen3_vl", words, pictures))
        stay = ~entry.visual
        blind = oracle.Entry(entry.embeds[stay], entry.visual[stay], entry.positions[:, stay], entry.next_position, [])
        assert result.token_ids == oracle.greedy(hf, blind, lambda at: None, 5)[0]
        assert result.stats.exit_layer == -1 and result.stats.tokens_per_layer == [int(stay.sum())] * zoo.LAYERS


@pytest.mark.parametrize("block", [1, 700, 1 << 22])
def test_blocks_of_any_size_give_the_same(monkeypatch, block):
    """One query row at a time, a few, and all at once, against whole maps in float64."""
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", block)
    q, k, visual = case(heads=4, kv_heads=2, n=61)
    maps = whole_maps(q, k, 0.3)
    got = layer_statistics(q, k, visual, 13, 0.3)
    torch.testing.assert_close(got, torch.tensor(reduced(maps, visual, 13), dtype=torch.float64), rtol=1e-5, atol=1e-6)


def case(heads, kv_heads, n, width=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, h, width, generator=rng) for h in (heads, kv_heads))
    visual = torch.zeros(n, dtype=torch.bool)
    visual[5 : n - 13] = True
    visual[11] = False  # text between two pictures: neither the prefix nor T
    return q, k, visual


def whole_maps(q, k, scale):
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("ihd,jhd->hij", q.double(), k) * scale
    return logits.masked_fill(torch.ones(len(q), len(q), dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def test_extreme_logits_stay_finite():
    """Attention that is all on one key underflows elsewhere: entropy 0, not NaN."""
    q, k, visual = case(heads=2, kv_heads=2, n=40)
    k[0] = 100 * q[-13:].mean(0).sign()
    got = layer_statistics(q * 100, k, visual, 13, 1.0)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[:3], torch.tensor(reduced(whole_maps(q * 100, k, 1.0), visual, 13)[:3]).double())


def test_bfloat16_keys_are_read_in_fp32():
    q, k, visual = (t.bfloat16() if t.is_floating_point() else t for t in case(heads=4, kv_heads=1, n=50))
    want = torch.tensor(reduced(whole_maps(q, k, 0.3), visual, 13), dtype=torch.float64)
    torch.testing.assert_close(layer_statistics(q, k, visual, 13, 0.3), want, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_on_a_gpu():
    q, k, visual = case(heads=4, kv_heads=2, n=300)
    on_gpu = layer_statistics(q.cuda(), k.cuda(), visual.cuda(), 13, 0.3)
    torch.testing.assert_close(on_gpu, layer_statistics(q, k, visual, 13, 0.3), rtol=1e-5, atol=1e-6)


def peak_bytes(run):
    """The most that is allocated at once while `run` runs, beyond what was there before, from torch's own record."""
    with profile(profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    alive = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    assert len(events) > 100
    return int(alive.max())


def test_memory_is_linear_in_the_sequence():
    """LLaVA-NeXT's 2,950 tokens and 32 heads: two blocks of fixed size, and at most 1 KB for each token."""
    block, peak = 4 * attention.BLOCK_ELEMENTS, {}
    for n in (738, 1475, 2950):
        q, k, visual = case(heads=32, kv_heads=32, n=n, width=128)
        peak[n] = peak_bytes(lambda: layer_statistics(q, k, visual, 13, 128**-0.5))  # noqa: B023 (called at once)
        assert peak[n] <= 2 * block + 1024 * n, f"{n} tokens: {peak[n]} bytes"
    assert 30 * peak[2950] < 32 * 2950 * 2950 * 4, "a map of all heads would have been as small"


def sample(text, picture, key):
    return Sample(key, lambda: picture, text, None, SHORT, {"split": "all", "style": ""})


def test_measured_once_and_kept(tmp_path):
    """What the file holds is not computed again; batches of any size and the engine's own policy stay as they are."""
    engine, _ = build(policy=FixedExit(1), max_batch=3)
    texts, images = tiny.prompts(seed=4, n=7, images=(1,))
    texts = [text.replace("<image>", " ").strip() or "w1" for text in texts]
    samples = [sample(t, i[0], f"s{n}") for n, (t, i) in enumerate(zip(texts, images))]
    header = {"model_fingerprint": engine.model.fingerprint}
    names = {"exit": str, "key": str, "values": list}
    file = LineFile(tmp_path / "lines.jsonl", header, "attention", names)
    steps = []
    first = attention.measure(engine, samples[:4], 1, file, steps.append)
    assert engine.policy == FixedExit(1) and steps == [0, 3, 1]
    again = LineFile(tmp_path / "lines.jsonl", header, "attention", names)
    steps.clear()
    whole = attention.measure(engine, samples, 1, again, steps.append)
    assert steps == [4, 3]
    np.testing.assert_allclose(whole[:4], first, atol=1e-6)
    np.testing.assert_allclose(whole, attention.measure(engine, samples, 1), rtol=1e-5, atol=1e-6)  # other batches
    assert np.isnan(whole[:, 2, FIELDS.index("w_visual")]).all() and not np.isnan(whole[:, 1]).any()
    other = attention.measure(engine, samples, None, again)
    assert abs(other[:, 2] - whole[:, 2])[:, FIELDS.index("w_text")].max() > 1e-3


def test_lines_of_another_model_are_refused_and_a_cut_line_is_dropped(tmp_path):
    path, header = tmp_path / "lines.jsonl", {"model_fingerprint": "a", "dtype": "float32"}
    LineFile(path, header, "attention", {"key": int}).add([{"key": 1}, {"key": 2}])
    path.write_text(path.read_text() + '{"key": 3, "val')
    assert LineFile(path, header, "attention", {"key": int}).entries == [{"key": 1}, {"key": 2}]
    assert path.read_text().endswith('{"key": 2}\n')
    with pytest.raises(InvalidArgumentError, match=r"attention: .*lines.jsonl is of another model or dtype"):
        LineFile(path, {**header, "dtype": "bfloat16"}, "attention", {"key": int})
