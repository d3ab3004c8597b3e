"""One short run of each main kernel on odd sizes, small enough to repeat under compute-sanitizer on a GPU:

compute-sanitizer --tool memcheck python -m pytest -m gpu tests/ops/test_sanitizer.py
"""

import pytest
import torch

from dyvte_engine.kernels import ops

from . import (
    test_decode_attention,
    test_decode_linear,
    test_exit_head,
    test_kv_compact,
    test_rope_append,
    test_rope_append_attention,
    test_token_score,
)


def norms(dtype: torch.dtype, rows: int, d: int) -> dict:
    x, y, weight, bias = (torch.randn(shape).to(dtype) for shape in ((rows, d), (rows, d), (d,), (d,)))
    return {"x": x, "y": y, "weight": weight, "bias": bias, "eps": 1e-5}


CASES = {
    "exit_head": (ops.exit_head, lambda t: test_exit_head.make("cpu", t, 83, 33, 15)),
    "exit_head-wide": (ops.exit_head, lambda t: test_exit_head.make("cpu", t, 264, 33, 12, batch=9)),
    "kv_compact": (ops.kv_compact_, lambda t: test_kv_compact.make("cpu", t, [[100, 7], [0, 83]], 16, 2, 83, 0.6)),
    "rope_append": (ops.rope_append_, lambda t: test_rope_append.make("cpu", t, [3, 0, 83], (6, 2), 80, 32, 16)),
    "rope_append-odd": (ops.rope_append_, lambda t: test_rope_append.make("cpu", t, [5, 1], (2, 2), 83, 82, 7)),
    "token_score": (
        ops.token_score,
        lambda t: test_token_score.make("cpu", t, [1, 0, 40, 3], [769, 9, 67, 1], (6, 2), 83),
    ),
    "token_score-row": (
        ops.token_score,
        lambda t: test_token_score.make("cpu", t, [1, 0, 2, 1], [769, 9, 67, 1], (6, 2), 64),
    ),
    "add_layer_norm": (ops.add_layer_norm, lambda t: norms(t, 5, 1160)),
    "add_layer_norm-odd": (ops.add_layer_norm, lambda t: norms(t, 3, 83)),
    "quick_gelu": (ops.quick_gelu_, lambda t: {"x": torch.randn(7, 83).to(t)}),
    "decode_attention": (
        ops.decode_attention,
        lambda t: test_decode_attention.make("cpu", t, [0, 83, 769], (7, 1), 128, 16),
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_sanitizer(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    op, make = CASES[name]
    host = make(dtype)
    device = {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in host.items()}
    op(**device)
    op(**host)
    for n, v in host.items():
        if isinstance(v, torch.Tensor):
            torch.testing.assert_close(device[n].cpu(), v, rtol=2e-2, atol=2e-2)


DECODING = {
    "norm_gate_up": (
        ops.norm_gate_up,
        ops.norm_gate_up_ref,
        lambda t: test_decode_linear.entry("cpu", t, 7, 2 * 83, 1096, True),
    ),
    "norm_linear": (
        ops.norm_linear,
        ops.norm_linear_ref,
        lambda t: test_decode_linear.entry("cpu", t, 1, 4999, 264, False),
    ),
    "add_linear": (ops.add_linear_, ops.add_linear_ref, lambda t: added(t, 8, 83, 520)),
    "rms_norm": (
        ops.add_rms_norm_,
        ops.add_rms_norm_ref,
        lambda t: {
            **{n: torch.randn(3, 5160).to(t) for n in ("residual", "x")},
            "weight": torch.ones(5160).to(t),
            "eps": 1e-5,
        },
    ),
    "rope_append_attention": (
        ops.rope_append_attention_,
        ops.rope_append_attention_ref,
        lambda t: test_rope_append_attention.make("cpu", t, [0, 83, 769], (9, 1), 128, 128, 16),
    ),
    "norm_qkv_append": (
        ops.norm_qkv_append_,
        ops.norm_qkv_append_ref,
        lambda t: test_decode_linear.qkv("cpu", t, 3, (6, 2), 80, 264, True),
    ),
}


def added(dtype: torch.dtype, rows: int, n: int, k: int) -> dict:
    args = test_decode_linear.weights("cpu", dtype, rows, n, k, True)
    del args["norm"]
    return {"residual": torch.randn(rows, n).to(dtype), **args}


@pytest.mark.gpu
@pytest.mark.parametrize("name", DECODING)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_products_of_a_decoding_step(name: str, half: torch.dtype) -> None:
    torch.manual_seed(0)
    op, reference, make = DECODING[name]
    host = make(half)
    device = {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in host.items()}
    got, want = op(**device), reference(**host)
    tensors = [(device[n], v) for n, v in host.items() if isinstance(v, torch.Tensor)]
    for there, here in tensors + ([] if want is None else [(got, want)]):
        torch.testing.assert_close(there.cpu(), here, rtol=3e-2, atol=3e-2)
