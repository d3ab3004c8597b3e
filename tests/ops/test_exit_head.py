import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dyvte_engine.kernels import ops

from .common import OPCHECK, assert_as_good_as_torch, check_errors, int32

ROWS = 83
RANGES = [[0, 0], [3, 4], [5, 40], [40, ROWS], [10, 12]]  # empty, one row, many, up to the end, two rows
VISUAL = [[7, 8, 9], [0], [82, 1, 1, 30], [], list(range(20))]


def make(device: str, dtype: torch.dtype, d: int, inner: int, states: int, batch: int = 40) -> dict:
    n_states = states.bit_count()
    hidden = torch.randn(ROWS, d + 8, dtype=dtype, device=device)[:, :d]  # a row-strided view
    more = [torch.randperm(ROWS)[:2].sort().values.tolist() for _ in range(batch)]
    visual = (VISUAL + [torch.randint(0, ROWS, (n % 30,)).tolist() for _, n in more])[:batch]
    cu = int32([0, *torch.tensor([len(v) for v in visual]).cumsum(0).tolist()], device)
    wants_visual = states & 3
    return {
        "hidden": hidden,
        "text_ranges": int32((RANGES + more)[:batch], device).view(batch, 2),
        "visual_rows": int32([r for v in visual for r in v], device) if wants_visual else None,
        "visual_cu": cu if wants_visual else None,
        "w1": (torch.randn(inner, n_states * d, device=device) / d**0.5).to(dtype),
        "w2": (torch.randn(2, inner, device=device) / inner**0.5).to(dtype),
        "states": states,
        "threshold": 0.5,
        "rms_eps": None,
        "b1": torch.randn(inner, dtype=dtype, device=device) if inner % 2 else None,
    }


def plain(args: dict, dtype: torch.dtype) -> Tensor:
    """The head written with torch calls in `dtype`."""
    hidden, w1, w2 = (args[n].to(dtype) for n in ("hidden", "w1", "w2"))
    p = torch.zeros(len(args["text_ranges"]), dtype=dtype)
    for b, (begin, end) in enumerate(args["text_ranges"].tolist()):
        text = hidden[begin:end]
        visual = text[:0]
        if args["visual_rows"] is not None:
            v0, v1 = args["visual_cu"][b : b + 2].tolist()
            visual = hidden[args["visual_rows"][v0:v1].long()]
        parts = [visual, visual[-1:], text[:-1] if len(text) > 1 else text, text[-1:]]
        parts = [x for bit, x in enumerate(parts) if args["states"] >> bit & 1]
        if all(len(x) for x in parts):
            pooled = torch.stack([x.mean(0) for x in parts])
            if args["rms_eps"] is not None:
                pooled = F.rms_norm(pooled, pooled.shape[-1:], eps=args["rms_eps"])
            bias = None if args["b1"] is None else args["b1"].to(dtype)
            p[b] = F.linear(F.gelu(F.linear(pooled.flatten(), w1, bias)), w2).softmax(-1)[1]
    return p


@pytest.mark.parametrize("states", [12, 3, 15, 4])
@pytest.mark.parametrize("d,inner", [(64, 32), (83, 7), (769, 33), (1, 1)])
def test_against_torch(device: str, dtype: torch.dtype, d: int, inner: int, states: int) -> None:
    args = make(device, dtype, d, inner, states)
    p, fires = ops.exit_head(**args)
    assert p.dtype == torch.float32 and fires.dtype == torch.bool
    exact = plain(args, torch.float64)
    own = plain(args, dtype).float()
    assert_as_good_as_torch(p.cpu(), own, exact)
    assert torch.equal(fires, p > 0.5)
    empty = [0] if states & 12 else []
    empty += [3] if states & 3 else []
    assert all(p[b] == 0 and not fires[b] for b in empty)


@pytest.mark.parametrize("batch", [0, 1, 2, 7, 8, 19])
def test_batches(device: str, dtype: torch.dtype, batch: int) -> None:
    """A sequence's result does not depend on its batch, and twice the same call gives the same bits."""
    args = make(device, dtype, 264, 40, 15, batch)
    p, _ = ops.exit_head(**args)
    assert torch.equal(p, ops.exit_head(**args)[0])
    for b in range(batch):
        v0, v1 = args["visual_cu"][b : b + 2].tolist()
        alone = args | {
            "text_ranges": args["text_ranges"][b : b + 1].contiguous(),
            "visual_rows": args["visual_rows"][v0:v1].contiguous(),
            "visual_cu": int32([0, v1 - v0], device),
        }
        torch.testing.assert_close(ops.exit_head(**alone)[0], p[b : b + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rms_eps", [1e-6, 0.1])
def test_rms(device: str, dtype: torch.dtype, rms_eps: float) -> None:
    args = make(device, dtype, 769, 33, 12) | {"rms_eps": rms_eps}
    assert_as_good_as_torch(ops.exit_head(**args)[0].cpu(), plain(args, dtype).float(), plain(args, torch.float64))


def test_threshold(device: str) -> None:
    args = make(device, torch.float32, 64, 32, 12)
    p, _ = ops.exit_head(**args)
    _, fires = ops.exit_head(**args | {"threshold": p[2].item()})
    assert not fires[2]  # strictly greater
    assert torch.equal(fires, p > p[2])


def test_full_size(device: str) -> None:
    """LLaVA-7B's own size: d = 4096, h = 2048."""
    args = make(device, torch.bfloat16, 4096, 2048, 12)
    exact = plain(args, torch.float64)
    assert_as_good_as_torch(ops.exit_head(**args)[0].cpu(), plain(args, torch.bfloat16).float(), exact)


@pytest.mark.parametrize("states", [12, 15])
@pytest.mark.parametrize("inner", [32, 33])  # an odd one has a bias
def test_ref_and_opcheck(device: str, dtype: torch.dtype, states: int, inner: int) -> None:
    args = make(device, dtype, 64, inner, states)
    p, fires = ops.exit_head(**args)
    ref_p, ref_fires = ops.exit_head_ref(**args)
    torch.testing.assert_close(p, ref_p, rtol=1e-5, atol=1e-5)
    assert torch.equal(fires, ref_fires)
    torch.library.opcheck(torch.ops.dyvte.exit_head.default, tuple(args.values()), test_utils=OPCHECK)


def test_errors(device: str) -> None:
    good = make(device, torch.float32, 64, 32, 12)
    visual = make(device, torch.float32, 64, 32, 15)
    check_errors(
        ops.exit_head,
        good,
        [
            ("hidden", good["hidden"][0], ""),
            ("hidden", good["hidden"].double(), ""),
            ("hidden", good["hidden"].t(), ""),
            ("hidden", torch.empty(3, 0, device=device), ""),
            ("text_ranges", good["text_ranges"].long(), ""),
            ("text_ranges", good["text_ranges"][:, :1], ""),
            ("w1", good["w1"][:, 1:], ""),
            ("w1", good["w1"].bfloat16(), ""),
            ("w1", good["w1"][:0], "w1 must"),
            ("w2", good["w2"][:, 1:], ""),
            ("states", 0, ""),
            ("states", 16, ""),
            ("states", 15, "w1 must"),
            ("rms_eps", -1.0, ""),
            ("visual_rows", visual["visual_rows"], ""),
            ("b1", torch.zeros(33, device=device), ""),
            ("b1", torch.zeros(32, device=device).bfloat16(), ""),
            ("b1", torch.zeros(64, device=device)[::2], ""),
        ],
    )
    check_errors(
        ops.exit_head,
        visual,
        [("visual_rows", None, ""), ("visual_cu", None, ""), ("visual_cu", visual["visual_cu"][1:], "")],
    )


def test_index_values_on_cpu() -> None:
    good = make("cpu", torch.float32, 64, 32, 15)
    check_errors(
        ops.exit_head,
        good,
        [
            ("text_ranges", int32([[0, 84]] * 40, "cpu"), r"text_ranges\[1\] must be in 0..83, got 84"),
            ("text_ranges", int32([[-1, 4]] * 40, "cpu"), r"text_ranges\[0\] must be in 0..83, got -1"),
            ("text_ranges", int32([[5, 4]] * 40, "cpu"), r"text_ranges\[1\] must be in 5..83, got 4"),
            ("visual_rows", good["visual_rows"] + 83, r"visual_rows\[0\] must be in 0..82, got 90"),
            ("visual_cu", good["visual_cu"] + 1, r"visual_cu\[0\] must be in 0..0, got 1"),
        ],
    )
