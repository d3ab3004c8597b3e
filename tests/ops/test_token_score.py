import pytest
import torch
from torch import Tensor

from dyvte_engine.kernels import ops

from .common import OPCHECK, assert_as_good_as_torch, check_errors, cumulative, int32


def make(
    device: str, dtype: torch.dtype, queries: list[int], keys: list[int], heads: tuple[int, int], dim: int
) -> dict:
    hq, hkv = heads
    q = torch.randn(sum(queries), (hq + 1) * dim, device=device).to(dtype)[:, : hq * dim].unflatten(1, (hq, dim))
    k = torch.randn(sum(keys), (hkv + 3) * dim, device=device).to(dtype)[:, : hkv * dim].unflatten(1, (hkv, dim))
    cu = [cumulative(n, device) for n in (queries, keys)]
    return {"q": q, "k": k, "cu_q": cu[0], "cu_k": cu[1], "scale": dim**-0.5}


def plain(args: dict, dtype: torch.dtype) -> Tensor:
    """The attention map of every sequence, written with torch calls in `dtype`, averaged over heads and queries."""
    out = []
    cq, ck = args["cu_q"].tolist(), args["cu_k"].tolist()
    for b in range(len(cq) - 1):
        q, k = args["q"][cq[b] : cq[b + 1]].to(dtype), args["k"][ck[b] : ck[b + 1]].to(dtype)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        s = q.transpose(0, 1) @ k.permute(1, 2, 0) * args["scale"]  # [Hq, nq, nk]
        seen = torch.ones_like(s, dtype=torch.bool).tril(k.shape[0] - q.shape[0])
        p = s.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)
        out.append(p.sum((0, 1)) / max(1, q.shape[0] * q.shape[1]))
    return torch.cat(out)


CASES = [
    ([1], [83], (2, 2), 64),
    ([1, 1, 1], [576, 7, 1], (32, 8), 128),
    ([1, 0, 7, 40, 5, 3], [769, 9, 7, 67, 0, 1], (6, 2), 83),
    ([1] * 8, [640, 1, 31, 32, 33, 127, 0, 9], (40, 40), 128),
    ([1, 1], [70, 300], (28, 4), 256),
    ([5, 0, 0, 1, 0, 2], [769, 9, 7, 67, 0, 1], (6, 2), 83),  # as many rows as sequences, but not one each
    ([64, 65], [64, 130], (4, 1), 80),
    ([0, 0], [3, 4], (2, 1), 7),
    ([9], [5], (2, 1), 256),
    ([3], [0], (2, 1), 64),
    ([300], [300], (7, 1), 64),
]


@pytest.mark.parametrize("queries,keys,heads,dim", CASES)
def test_against_torch(device, dtype, queries, keys, heads, dim) -> None:
    args = make(device, dtype, queries, keys, heads, dim)
    score = ops.token_score(**args)
    assert score.dtype == torch.float32
    assert_as_good_as_torch(score, plain(args, dtype).float(), plain(args, torch.float64))
    assert torch.equal(score, ops.token_score(**args))
    for b, nq in enumerate(queries):
        part = score[args["cu_k"][b] : args["cu_k"][b + 1]]
        seeing = min(nq, keys[b]) / nq if nq else 0.0  # query rows that see at least one key
        assert part.sum().item() == pytest.approx(seeing if keys[b] else 0.0, abs=1e-4)


def test_large_scores(device: str) -> None:
    """Scores far beyond exp's range: the softmax must not overflow."""
    args = make(device, torch.float32, [3], [40], (2, 1), 64) | {"scale": 300.0}
    score = ops.token_score(**args)
    assert score.isfinite().all()
    torch.testing.assert_close(score.double(), plain(args, torch.float64), rtol=1e-3, atol=1e-3)


def test_ref_and_opcheck(device: str, dtype: torch.dtype) -> None:
    args = make(device, dtype, [1, 0, 7], [40, 9, 7], (4, 2), 64)
    torch.testing.assert_close(ops.token_score(**args), ops.token_score_ref(**args), rtol=1e-4, atol=1e-6)
    torch.library.opcheck(torch.ops.dyvte.token_score.default, tuple(args.values()), test_utils=OPCHECK)


def test_errors(device: str) -> None:
    good = make(device, torch.float32, [3, 2], [5, 9], (4, 2), 64)
    check_errors(
        ops.token_score,
        good,
        [
            ("q", good["q"][0], ""),
            ("q", good["q"][:, :3], ""),
            ("q", torch.zeros(5, 4, 257, device=device), "k must"),
            ("k", good["k"][..., 1:], ""),
            ("k", good["k"].half(), ""),
            ("cu_q", good["cu_q"].long(), ""),
            ("cu_q", good["cu_q"][:0], ""),
            ("cu_k", good["cu_k"][1:], ""),
        ],
    )
    wide = torch.zeros(5, 4, 257, device=device)
    with pytest.raises(RuntimeError, match=r"q must have a head size in 1..256"):
        ops.token_score(wide, wide, good["cu_q"], good["cu_q"], 1.0)


def test_index_values_on_cpu() -> None:
    good = make("cpu", torch.float32, [3, 2], [5, 9], (4, 2), 64)
    check_errors(
        ops.token_score,
        good,
        [
            ("cu_q", int32([0, 3, 6], "cpu"), r"cu_q\[2\] must be in 3..5, got 6"),
            ("cu_k", int32([0, 5, 13], "cpu"), r"cu_k\[2\] must be in 14..14, got 13"),
        ],
    )
