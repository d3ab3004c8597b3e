"""Arguments of the wrong kind are refused by name where a policy, a calibration or a set of heads is made."""

import math
from decimal import Decimal

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
    ],
)
def test_odd_arguments(make, odd):
    with pytest.raises(InvalidArgumentError, match="accepted:"):
        make(odd)


def test_numbers_of_numpy_are_numbers():
    model = build()[0].model
    assert FixedExit(np.int64(2)).bind(model) == FixedExit(2)
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
    heads = ExitHeads(ExitHeadConfig(8, 3, head_hidden=4, rms_eps=np.float32(0.5)))
    heads.save(tmp_path / "heads.safetensors")
    assert ExitHeads.load(tmp_path / "heads.safetensors").config == heads.config
