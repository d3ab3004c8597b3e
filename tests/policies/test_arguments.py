"""Arguments of the wrong kind are refused by name where a policy, a calibration or a set of heads is made."""

import math
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dyvte_engine import (
    DivPrune,
    Downsample,
    ExitHeadConfig,
    ExitHeads,
    FastV,
    FixedExit,
    InvalidArgumentError,
    PyramidDrop,
    Random,
    ToMe,
    VisionZip,
    compose,
)
from dyvte_engine.heads.calibration import Calibration
from tests.engine.conftest import build

ODD = (None, "x", True, [1], {}, object(), torch.ones(2, 3), torch.float64, 1j, Decimal("0.5"), math.nan, np.zeros(2))


@pytest.mark.parametrize("odd", ODD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "make",
    [
        lambda odd: DivPrune(odd),
        lambda odd: ToMe(odd),
        lambda odd: Downsample(odd),
        lambda odd: VisionZip(odd, 1),
        lambda odd: VisionZip(1, odd),
        lambda odd: FastV(odd),
        lambda odd: FastV(2, odd),
        lambda odd: FastV(2, 0.5, odd),
        lambda odd: PyramidDrop(odd),
        lambda odd: PyramidDrop((0.5, odd, 0.1)),
        lambda odd: Random(odd),
        lambda odd: Random(0, odd),
        lambda odd: Random(0, 0.5, odd),
        lambda odd: compose(odd),
        lambda odd: ExitHeadConfig(8, 4, states=odd),
        lambda odd: ExitHeadConfig(8, 4, states=["mean_text", odd]),
    ],
)
def test_odd_arguments(make, odd):
    with pytest.raises(InvalidArgumentError, match="accepted:"):
        make(odd)


def test_numbers_of_numpy_are_numbers():
    model = build()[0].model
    assert FixedExit(np.int64(2)).bind(model) == FixedExit(2)
    assert FixedExit(-1).bind(model) == FixedExit(-1)
    for beyond in (-2, 4):
        with pytest.raises(InvalidArgumentError, match=f"FixedExit layer is {beyond}; accepted: -1 to 3"):
            FixedExit(beyond).bind(model)
    assert FastV(np.int32(2), np.float32(0.5)) == FastV(2, 0.5)
    with pytest.raises(InvalidArgumentError, match="layer is True"):
        FixedExit(True).bind(model)


def test_a_factor_beyond_the_picture_leaves_its_mean():
    features = torch.randn(16, 8)
    torch.testing.assert_close(Downsample(2**40).reduce([features])[0], features.mean(0, keepdim=True))


def test_calibration():
    p, agree, flops = torch.rand(30, 4), torch.rand(30, 4) > 0.1, torch.rand(30, 4) + 1
    curve = Calibration.measure(p, agree, flops)
    for odd in ODD:
        for given in ((odd, agree, flops), (p, odd, flops), (p, agree, odd), (p, agree, flops, odd)):
            with pytest.raises(InvalidArgumentError, match="accepted:"):
                Calibration.measure(*given)
        for call in (curve.for_agreement, curve.for_flops, curve.at):
            with pytest.raises(InvalidArgumentError, match="accepted:"):
                call(odd)
    for odd in (p[:0], p[0], p[:, :2], p.to("meta"), p.to(torch.float8_e4m3fn), p.to_sparse(), p * math.nan):
        with pytest.raises(InvalidArgumentError, match="accepted:"):
            Calibration.measure(odd, agree, flops)


def test_where_every_threshold_keeps_the_promise_the_lowest_is_taken():
    p = torch.rand(200, 4)
    curve = Calibration.measure(p, torch.ones(200, 4, dtype=torch.bool), torch.ones(200, 4))
    assert curve.for_agreement(0.5) == curve.thresholds[-1]


def test_a_number_of_numpy_goes_into_a_heads_file(tmp_path):
    heads = ExitHeads(ExitHeadConfig(8, np.int64(3), head_hidden=4, rms_eps=np.float32(0.5)))
    heads.save(tmp_path / "heads.safetensors")
    assert ExitHeads.load(tmp_path / "heads.safetensors").config == heads.config


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_heads_answer_for_the_layers_they_have(layers, shared):
    heads = ExitHeads(ExitHeadConfig(8, layers, 4, ("mean_text",), shared=shared), seed=0)
    pooled = torch.randn(2, 8)
    for layer in (-1, layers, 2**70, True, 0.0, None, "0"):
        for ask in (heads.of_layer, lambda layer: heads(pooled, layer)):
            with pytest.raises(InvalidArgumentError, match=rf"layer is .*; accepted: 0 to {layers - 1}"):
                ask(layer)
    assert heads(pooled, np.int64(layers - 1)).equal(heads(pooled, layers - 1))
    for other in ((2, layers + 1, 8), (2, layers - 1, 8), (2, 8), (2, 2, layers, 8), (2, layers, 9)):
        with pytest.raises(InvalidArgumentError, match=r"pooled is .*; accepted: \["):
            heads.all_layers(torch.zeros(other))


@pytest.mark.parametrize("name", ["hidden_size", "num_layers", "head_hidden"])
def test_sizes_of_heads_are_whole_numbers(name):
    sizes = {"hidden_size": 8, "num_layers": 3, "head_hidden": 4}
    for odd in (*ODD, 0, -1, 1.0):
        with pytest.raises(InvalidArgumentError, match=rf"(?s){name} is .*; accepted: whole numbers, at least 1"):
            ExitHeadConfig(**sizes | {name: odd})
    assert type(getattr(ExitHeadConfig(**sizes | {name: np.int64(2)}), name)) is int


def test_what_is_not_given():
    assert FastV() == FastV(2, 0.5, "last") and Random() == Random(0, 0.5, 0)
    assert ExitHeadConfig(8, 4) == ExitHeadConfig(8, 4, 2048, ("mean_text", "last_text"), None, False)


def test_the_ends_of_ranges():
    model = build()[0].model  # of four layers
    assert FastV(3).bind(model) == FastV(3) and PyramidDrop().bind(model) == PyramidDrop()
    assert ExitHeadConfig(8, 4, rms_eps=0).rms_eps == 0
    three = SimpleNamespace(shape=SimpleNamespace(num_layers=3))
    for refused in (
        lambda: FastV(4).bind(model),
        lambda: FastV(2, 1.5),
        lambda: PyramidDrop().bind(three),
        lambda: ExitHeadConfig(8, 4, rms_eps="x"),
    ):
        with pytest.raises(InvalidArgumentError, match=r"accepted:|needs 4 layers"):
            refused()


def test_chance_within_the_decoder_leaves_pictures_alone():
    features = [torch.randn(4, 8)]
    assert Random(1, 0.5).reduce(features)[0] is features[0]
    assert len(Random(0, 0.5).reduce(features)[0]) == 2


@pytest.mark.parametrize(
    "given",
    [
        lambda vocab: [],
        lambda vocab: [5],
        lambda vocab: [5, 6, 7],
        lambda vocab: [5, -1],
        lambda vocab: [5, vocab],
        lambda vocab: [5, 1.0],
        lambda vocab: 5,
        lambda vocab: torch.tensor([5, vocab]),
        lambda vocab: torch.tensor([-1, 5]),
        lambda vocab: torch.tensor([5.0, 6.0]),
    ],
)
def test_tokens_that_are_none_are_refused_and_nothing_moves(given):
    engine, _ = build()
    vocab = engine.model.decoder.shape.vocab_size
    tokens = given(vocab)
    embeds = torch.randn(3, 64)
    with engine.prefill([embeds, embeds], [torch.zeros(3, dtype=torch.bool)] * 2) as running:
        before = running.logits.clone()
        with pytest.raises(InvalidArgumentError, match="one token id"):
            running.step(tokens)
        assert torch.equal(running.logits, before) and running.positions.tolist() == [3, 3]
        listed = running.step([0, vocab - 1]).clone()
    with engine.prefill([embeds, embeds], [torch.zeros(3, dtype=torch.bool)] * 2) as running:
        assert torch.equal(running.step(torch.tensor([0, vocab - 1])), listed)
