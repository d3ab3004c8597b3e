"""What the benchmarks compute from their measurements: fits, intervals, limits, counts of work. No time is tested."""

import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import breakdown, common, curves, floors, roofline
from dyvte_engine import Engine
from dyvte_engine.flops import true_flops
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine.from_pretrained(
        tiny.save(tmp_path_factory.mktemp("tiny")), dtype="float32", device="cpu", max_len=256
    )


def test_exponent_of_a_power_law():
    x = [144, 288, 576, 2880]
    found = common.fit_exponent(x, [0.3 * v**1.5 for v in x])
    assert found["exponent"] == pytest.approx(1.5)
    assert found["error"] == pytest.approx(0, abs=1e-6)


def test_exponent_error_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    x = np.geomspace(10, 1000, 9)
    y = x**0.7 * np.exp(rng.normal(0, 0.1, 9))
    a = np.stack((np.log(x), np.ones(9)), 1)
    solution, residual, *_ = np.linalg.lstsq(a, np.log(y), rcond=None)
    covariance = np.linalg.inv(a.T @ a) * residual[0] / 7
    found = common.fit_exponent(x, y)
    assert found["exponent"] == pytest.approx(solution[0])
    assert found["error"] == pytest.approx(math.sqrt(covariance[0, 0]))


def test_wilson_interval():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20
    assert common.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert common.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_spread_and_paired_ratio():
    assert common.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5}
    assert common.spread([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "n": 1}
    assert common.paired_ratio([2.0, 6.0, 8.0], [1.0, 2.0, 8.0])["median"] == 2.0


def test_limits_take_the_slower_of_both():
    limits = common.Limits(flops=100.0, bytes=10.0)
    assert limits.seconds(200, 10) == 2.0
    assert limits.seconds(200, 50) == 5.0
    assert roofline.share(2.0, 8.0) == 0.25
    assert roofline.share(2.0, None) is None


def test_rounds_end_with_the_time_but_not_before_the_least():
    assert list(common.rounds_within(0.0, least=3, most=50)) == [0, 1, 2]
    assert list(common.rounds_within(1e9, least=3, most=5)) == [0, 1, 2, 3, 4]


def test_interleaving_calls_each_once_a_round():
    seen = []
    times = common.interleave({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2, CPU, warmup=1)
    assert seen == ["a", "b"] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_peak_is_the_most_held_at_one_time():
    def call():
        a = torch.ones(1 << 18)  # 1 MiB
        b = a + 1
        del a
        return b * 2, b

    assert 2 << 20 <= common.peak_bytes(call, CPU) < (2 << 20) + 4096


def test_the_head_of_a_gpu_record_tells_gpu_driver_and_commit(tmp_path, monkeypatch):
    """With a stand-in for the GPU and for what tells its driver."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.delenv("DYVTE_COMMIT", raising=False)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n[ $1 = --query-gpu=driver_version ] && printf '550.54.15\\n550.54.15\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    describe = ["git", "describe", "--always", "--dirty"]
    told = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    monkeypatch.chdir(tmp_path)
    about = common.machine(torch.device("cuda:1"))
    assert (about["device"], about["gpu"], about["driver"]) == ("cuda:1", "GPU 1", "550.54.15")
    assert about["commit"] == told.strip()  # that of the benchmarks, wherever they are called
    tool.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(subprocess.CalledProcessError):
        common.machine(torch.device("cuda:1"))
    assert "driver" not in common.machine(CPU)


def test_union_of_spans():
    assert breakdown.covered([(0, 2), (1, 3), (1, 2), (5, 6)]) == 4.0


def test_ranges_inside_ranges_add_up(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0, 12.0])
    monkeypatch.setattr(breakdown.time, "perf_counter", lambda: next(clock))
    ranges = breakdown.Ranges(CPU)
    ranges.enter("outer")  # 0
    ranges.enter("inner")  # 1
    ranges.leave()  # 3
    ranges.rename("later")  # 7
    ranges.leave()  # 12
    assert dict(ranges.seconds) == {"outer": 5.0, "inner": 2.0, "later": 5.0}


def test_mean_over_tasks_and_its_interval():
    values, tasks = np.array([1, 0, 1, 0, 1, 1, 0.0]), np.array(["a"] * 4 + ["b"] * 3)
    mean, half = curves.task_mean(values, tasks)
    assert mean == pytest.approx((1 / 2 + 2 / 3) / 2)
    variance = (np.var([1, 0, 1, 0], ddof=1) / 4 + np.var([1, 1, 0], ddof=1) / 3) / 4
    assert half == pytest.approx(1.96 * math.sqrt(variance))


def test_best_below_a_cost():
    points = [{"flops": 0.3, "accuracy": 0.5}, {"flops": 0.5, "accuracy": 0.9}, {"flops": 0.9, "accuracy": 0.95}]
    assert curves.best_below(points, "flops", 0.5)["accuracy"] == 0.9
    assert curves.best_below(points, "flops", 0.2) is None


def counted(call):
    """FLOPs by operation, counted by torch while the call runs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}


def test_decoding_flops_are_those_torch_counts(engine):
    """One token on a cache of 37 rows, transformers with eager attention."""
    model = engine.model.hf
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            cache = model(input_ids=torch.full((1, 37), 7), use_cache=True).past_key_values
        found = counted(lambda: model(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True))
    finally:
        model.set_attn_implementation("sdpa")
    rows = [[37] * engine.model.shape.num_layers]
    # transformers' rotary angles may be a product too, of 1 position and D/2 frequencies
    assert roofline.decode_work(engine, rows).flops == pytest.approx(sum(found.values()), rel=1e-3)


def test_vision_flops_are_those_torch_counts(engine):
    """Two pictures through tower and projector; the patch embedding (a convolution) is left out of both counts."""
    model = engine.model.hf.model
    model.set_attn_implementation("eager")
    pixels = torch.zeros(2, 3, 28, 28)
    try:
        found = counted(lambda: model.multi_modal_projector(model.vision_tower(pixels).last_hidden_state[:, 1:]))
    finally:
        model.set_attn_implementation("sdpa")
    assert roofline.vision_work(engine, pictures=2).flops == sum(n for op, n in found.items() if "conv" not in op)


def test_bytes_are_weights_and_cache_rows(engine):
    lm, shape = engine.model.hf.model.language_model, engine.model.shape
    weights = (
        sum(p.nbytes for p in lm.parameters()) - lm.embed_tokens.weight.nbytes + engine.model.hf.lm_head.weight.nbytes
    )
    row = 2 * shape.num_kv_heads * shape.head_dim * 4
    rows = [[30, 30, 10, 10], [20, 20, 20, 20]]
    assert roofline.prefill_work(engine, rows).bytes == weights + 160 * row
    assert roofline.decode_work(engine, rows).bytes == weights + 160 * row


def test_floors_of_7b_count_its_published_parameters():
    model = floors.Model.of("llava-1.5-7b")
    layers = 6_738_415_616 - 2 * 32_000 * 4096 - 4096  # LLaMA-7B without embedding, LM head and final norm
    assert 32 * model.layer == 2 * layers
    rows = [702] * 14 + [126] * 18
    found = floors.phases(model, rows, text=126, new_tokens=3)
    seen, after = found["layers with the picture"], found["layers after the exit"]
    assert (len(seen), len(after), len(found["decoding"])) == (14, 18, 2)
    flops = sum(w.flops for works in (seen, after, found["LM head"]) for w in works)
    assert flops == pytest.approx(true_flops(model.shape, rows))
    # 2 * 126 rows through the matrices of 18 layers, and their weights and K/V rows of 8,192 bf16 numbers
    assert sum(w.flops for w in after) == pytest.approx(18 / 32 * 2 * 126 * layers, rel=0.01)
    assert sum(w.bytes for w in after) == pytest.approx(18 / 32 * 2 * layers + 18 * 126 * 8192 * 2)
    cached = sum(rows)
    assert found["decoding"][1].bytes - found["decoding"][0].bytes == 32 * 8192 * 2
    head = 4096 * 32_064 * 2
    assert found["decoding"][0].bytes == 2 * layers + head + cached * 8192 * 2


def test_the_floors_in_the_docs_are_those_computed_now(tmp_path):
    docs = Path(__file__).parents[2] / "docs" / "performance.md"
    page = tmp_path / "page.md"
    page.write_text(docs.read_text())
    floors.main(["--page", str(page)])
    assert page.read_text() == docs.read_text()
    page.write_text("no marks")
    with pytest.raises(ValueError, match="floors: begin"):
        floors.main(["--page", str(page)])
