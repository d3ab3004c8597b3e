"""Each command at its smallest: what its JSON holds and whether its figures fit together. No time is tested."""

import gc
import gzip
import itertools
import json

import pytest
import torch

from benchmarks import (
    breakdown,
    capacity,
    curves,
    decisions,
    decoding,
    document,
    growth,
    kernels,
    policies,
    summary,
    versus,
    workload,
)
from benchmarks.common import Limits
from benchmarks.conclusions import conclusion
from benchmarks.kernel_cases import CASES, CPU_CASES, SIZES, Inputs, TooLarge
from tests import tiny
from tests.engine.conftest import build

COMMIT = "v1-2-gabc"  # as where there is no git
README, NANO_PAGE = (f"before\n<!-- {x}: begin -->\noutdated\n<!-- {x}: end -->\nafter\n" for x in ("speed", "nano"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYVTE_COMMIT", COMMIT)
        gc.freeze()  # a command collects before each method, and a session of tests holds millions of objects
        yield tmp_path_factory.mktemp("results")
        gc.unfreeze()


def run(module, out, *argv):
    """The JSON that a command wrote, its plot made sure of."""
    name = module.__name__.split(".")[-1]
    module.main(["--device", "cpu", "--out", str(out), *argv])
    assert (out / f"{name}.png").stat().st_size > 2000
    data = json.loads((out / f"{name}.json").read_text())
    assert data["benchmark"] == name
    assert data["command"].startswith(f"python -m benchmarks.{name} ")
    assert data["limits"]["flops"] > 0 and data["limits"]["bytes"] > 0
    assert data["machine"]["threads"] >= 1
    assert data["machine"]["commit"] == COMMIT
    return data


def check_spread(value):
    assert 0 <= value["q1"] <= value["median"] <= value["q3"]
    assert value["n"] >= 1


@pytest.fixture(scope="module")
def compared(checkpoint, out):
    return run(
        policies,
        out,
        "--model",
        checkpoint,
        "--batch",
        "1",
        "2",
        "--new-tokens",
        "3",
        "20",
        "--seconds",
        "0",
        "--least",
        "2",
    )


def test_policies_compares_everything_at_every_batch_size(compared):
    found = {(c["batch"], c["method"]) for c in compared["cases"]}
    names = {
        workload.HF,
        workload.HF_EAGER,
        "KeepAll",
        "FastV",
        "ToMe",
        "VTW (1)",
        "PyramidDrop",
        "DivPrune",
        "VisionZip",
    }
    names |= {"Random", "Downsample", "DyVTE", "DyVTE at layer 1", "DyVTE+FastV", "DyVTE+ToMe"}
    assert found == {(batch, name) for batch in (1, 2) for name in names}


def test_policies_of_some_methods(checkpoint, tmp_path):
    few = ["--batch", "1", "--new-tokens", "2", "--seconds", "0", "--least", "1", "--methods"]
    data = run(policies, tmp_path, "--model", checkpoint, *few, "DyVTE+FastV", "DyVTE")
    ours = ["KeepAll", "DyVTE", "DyVTE+FastV"]
    assert [c["method"] for c in data["cases"]] == [workload.HF_EAGER, workload.HF, *ours]
    with pytest.raises(SystemExit, match="--methods names 'dyvte'; accepted: KeepAll, FastV"):
        policies.main(["--model", checkpoint, "--device", "cpu", *few, "dyvte"])


def test_policies_times_and_ratios(compared):
    for c in compared["cases"]:
        for part in ("processor", "vision", "prefill", "per_token", "prefill_speedup", "per_token_speedup"):
            check_spread(c[part])
        assert list(c["until"]) == ["1", "3", "20"]
        # 1 and 3 come from the same runs, so their order holds on any machine; 20 comes from others
        assert c["until"]["1"]["median"] < c["until"]["3"]["median"]
        check_spread(c["until"]["20"])
        assert c["until"]["1"]["n"] == 4 and c["until"]["20"]["n"] == 2  # two short runs and two long ones
        if c["method"] == workload.HF:
            assert all(ratio["median"] == 1.0 for ratio in c["speedup"].values())
        for part, seconds in c["roofline"].items():
            assert c["share"][part] == pytest.approx(seconds / c[part]["median"])


def test_policies_memory_and_exits(compared):
    by_name = {c["method"]: c for c in compared["cases"] if c["batch"] == 1}
    row = 2 * 2 * 16 * 4  # K and V of 2 heads of 16 float32
    assert by_name["DyVTE"]["exit_layer"] == by_name["DyVTE+FastV"]["exit_layer"] == 1
    assert by_name["DyVTE"]["exited"] == 1 and by_name["FastV"]["exited"] == 0
    pages = by_name["KeepAll"]["kv_bytes"] / row / 4  # rows of a layer, a mean over the prompts
    assert pages >= by_name[workload.HF]["kv_bytes"] / row / 4 > pages - 16
    assert by_name["DyVTE"]["kv_bytes"] == (pages + pages - tiny.VISUAL_TOKENS) * 2 * row  # 16: whole pages leave
    assert by_name["DyVTE"]["prefill_gflops"] < by_name["KeepAll"]["prefill_gflops"]
    assert all(c["peak_bytes"] > 0 for c in compared["cases"])


def test_policies_knows_the_cache_of_transformers(checkpoint):
    engine = workload.load(checkpoint, "float32", "cpu", max_batch=3, new_tokens=2)
    request = workload.requests(engine, checkpoint, 3, 1)[0]
    _, results = request.run(engine.policy, 1)
    hf = engine.model.hf
    longest = max(r.stats.visual_tokens + r.stats.text_tokens for r in results)
    cache = hf.model.language_model(input_ids=torch.ones(3, longest, dtype=torch.long), use_cache=True).past_key_values
    assert policies.padded_cache(engine, results) == sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)


def test_breakdown_parts_make_up_the_request(checkpoint, out):
    data = run(breakdown, out, "--model", checkpoint, "--new-tokens", "3", "--seconds", "0")
    assert data["exit_layer"] == 1
    for name, method in data["methods"].items():
        assert list(method["parts"]) == list(breakdown.PARTS)
        assert (method["parts"]["layers after the exit"]["median"] > 0) == (name != "all stay")
        assert (method["parts"]["exit decisions"]["median"] > 0) == (name != "all stay")
        assert (method["parts"]["K/V compaction"]["median"] > 0) == (name == "exit, early K/V dropped")
        assert method["parts"]["host"]["q1"] > 0  # what no range covers: nothing is counted twice
    assert data["methods"]["exit"]["prefill_gflops"] < data["methods"]["all stay"]["prefill_gflops"]
    with gzip.open(out / "breakdown-exit.trace.json.gz", "rt") as file:
        names = {e.get("name") for e in json.load(file)["traceEvents"]}
    assert {"processor", "vision", "exit decisions", "rows leave", "decode", "sampling"} <= names


def test_growth_counts_bytes_and_fits_exponents(out):
    sizes = ["--base", "48", "4", "1", "2", "--visual", "48", "112", "--layers", "2", "4", "--batch", "1", "2"]
    data = run(growth, out, "--model", "64", *sizes, "--answer", "2", "4", "--seconds", "0")
    assert list(data["axes"]) == list(growth.AXES)
    layers = data["axes"]["layers"]
    full = [e["kv_bytes"] for e in layers["points"] if e["method"] == "all stay"]
    row = 2 * 64 * 4
    assert full == [n * -(-(growth.TEXT + 48 + 1) // 16) * 16 * row for n in (2, 4)]
    fit = next(f for f in layers["fits"] if f["method"] == "all stay" and f["part"] == "kv_bytes")
    assert fit["exponent"] == pytest.approx(1)
    visual = [e for e in data["axes"]["visual tokens"]["points"] if e["x"] == 112]
    stay, leave = (next(e for e in visual if e["method"] == m)["kv_bytes"] for m in ("all stay", "exit at half depth"))
    assert stay - leave == 2 * 112 * row


def fitting(lengths, pages, new_tokens, full, dropped=False):
    """Sequences admitted to pages of 16 rows, in 4 layers of which `full` see the picture; and the pages held then."""
    text, held = [n - tiny.VISUAL_TOKENS for n in lengths], 0

    def pages_of(rows, more):
        return sum(-(-(n + more) // 16) for n in rows)

    for count, i in enumerate(itertools.cycle(range(len(lengths)))):
        layers = [lengths[i]] * full + [text[i]] * (4 - full)
        answered = pages_of([text[i]] * 4 if dropped else layers, new_tokens - 1)
        if held + max(pages_of(layers, 0), answered) > pages:
            return count, held
        held += answered


def test_capacity_admits_what_fits(checkpoint, out):
    sizes = ["--budget", "0.5", "--questions", "5", "--sets", "2", "--new-tokens", "4", "--group", "4"]
    data = run(capacity, out, "--model", checkpoint, *sizes, "--seconds", "0", "--least", "2")
    page = 2 * 16 * 2 * 16 * 4  # K and V, rows, heads, numbers, float32
    assert data["budget"] == 128 * page
    engine = workload.load(checkpoint, "float32", "cpu", max_batch=5, new_tokens=1)
    stats = [r.stats for r in engine.generate(*workload.questions(checkpoint, 5), max_new_tokens=1)]
    lengths = [s.visual_tokens + s.text_tokens for s in stats]
    cases = {c["method"]: c for c in data["cases"]}
    names = ["FastV", "VTW (1)", "DyVTE", "DyVTE, mixed exits", "DyVTE+FastV"]
    assert list(cases) == ["KeepAll", *names, *(f"{name}, early K/V dropped" for name in names)]
    count, held = fitting(lengths, 128, 4, full=4)
    assert cases["KeepAll"]["sequences"] == count > 5  # questions came again
    assert cases["KeepAll"]["filled"] == held / 128
    assert cases["VTW (1)"]["sequences"] == cases["DyVTE"]["sequences"] == fitting(lengths, 128, 4, full=2)[0]
    dropped = fitting(lengths, 128, 4, full=2, dropped=True)
    assert cases["VTW (1), early K/V dropped"]["sequences"] == dropped[0]
    assert dropped[1] / 128 < cases["VTW (1), early K/V dropped"]["filled"] <= 1  # the peak of a prefill, not its rest
    assert [cases[name]["exit_layer"] for name in names] == [None, 1, 1, cases[names[3]]["exit_layer"], 1]
    for c in cases.values():
        assert c["more"] == c["sequences"] / count
        rates = [c[part]["median"] for part in ("sequences_per_s", "tokens_per_s", "decoded_per_s")]
        assert rates[1] == pytest.approx(4 * rates[0])
        assert rates[2] > 3 * rates[0]  # decoding alone takes less than all
        for part in ("prefill", "decode", "speedup", "kv_bytes"):
            check_spread(c[part])
    row = summary.capacity([data])[0].rows[-1]
    assert row[0] == "DyVTE+FastV, early K/V dropped" and row[2] == str(cases[row[0]]["sequences"])
    with pytest.raises(SystemExit, match="the K/V budget is too small: kv_memory is 8192 bytes"):
        run(capacity, out, "--model", checkpoint, "--budget", "0.01")
    with pytest.raises(SystemExit):
        capacity.main(["--new-tokens", "1"])


def test_capacity_throughput_is_of_all_sequences():
    found = capacity.throughput([(1.0, 3.0), (1.0, 1.0)], 8, new_tokens=5, base=[1.0, 1.0])
    assert found["sequences_per_s"] == {"median": 3.0, "q1": 2.5, "q3": 3.5, "n": 2}
    assert found["tokens_per_s"]["median"] == 15.0
    assert found["decoded_per_s"]["median"] == pytest.approx((32 / 3 + 32) / 2)
    assert found["speedup"]["median"] == (2 + 4) / 2


def test_capacity_joins_batches_and_draws_exits():
    """Batches prefilled apart decode together as one prefilled whole; each sequence leaves where it is told."""
    engine, _ = build(max_batch=6)
    texts, images = tiny.prompts(seed=3, n=6, images=(1, 2))
    prompts = engine.prepare(texts, images, chat=False)
    exits = [2, 0, 1, 1, 2, 0]
    policy = capacity.DrawnExit(workload.forced_exit(engine, 1).heads, exits=exits)
    pool = capacity.Pool(engine, prompts, group=2, new_tokens=41)
    whole, _ = pool.prefill(capacity.Method(policy), range(6))
    parts = [pool.prefill(capacity.Method(policy), group)[0] for group in ([0, 1, 2], [3], [4, 5])]
    assert whole.exit_layers == [layer for part in parts for layer in part.exit_layers] == exits
    together = pool.nobody(6)
    for part in parts:
        together.join(part.cache, part.logits)
    for _ in range(40):  # over the ends of pages
        torch.testing.assert_close(together.logits, whole.logits, rtol=1e-4, atol=1e-4)
        tokens = whole.logits.argmax(-1)
        whole.step(tokens)
        together.step(tokens)
    assert together.cache.bytes_held == whole.cache.bytes_held
    together.close()
    whole.close()
    assert engine.pool.allocator.used_count == engine.pool.claimed == 0


def test_capacity_leaves_a_gpu_room_beside_the_pool(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert capacity.default_budget(torch.device("cuda")) == 850
    assert capacity.default_budget(torch.device("cpu")) == 48 << 20


def test_drawn_exits_lie_around_the_mean():
    exits = torch.tensor(capacity.drawn(13, 32, 2000)).float()
    assert exits.mean().item() == pytest.approx(13, abs=0.2)
    assert (exits < 10).float().mean() < 0.1 < (exits < 12).float().mean()
    assert max(capacity.drawn(3, 4, 99)) == 2 and min(capacity.drawn(0, 4, 99)) == 0


def test_kernels_times_every_operation(out):
    data = run(kernels, out, "--sizes", "nano", "--batch", "1", "--compile", "--seconds", "0")
    assert [c["op"] for c in data["cases"]] == [case.__name__ for case in CASES + CPU_CASES]
    limits = Limits(**data["limits"])
    for c in data["cases"]:
        check_spread(c["seconds"]["dyvte"])
        check_spread(c["speedup"]["torch"])
        least = max(c["bytes"] / limits.bytes, c["flops"] / limits.flops)
        assert c["share"] == pytest.approx(least / c["seconds"]["dyvte"]["median"])


def test_a_case_that_does_not_fit_is_left_out_and_said_so():
    inputs = Inputs(SIZES["nano"], 1, torch.float32, torch.device("cpu"), budget=1000)
    with pytest.raises(TooLarge):
        inputs.randn(16, 16)
    entry = kernels.measure_case(CASES[0], inputs, 0.0, with_compile=False)
    assert entry == {"op": "exit_head", "batch": 1, "skipped": entry["skipped"]}


def test_decoding_times_steps(checkpoint, out):
    data = run(decoding, out, "--model", checkpoint, "--batch", "1", "2", "--rows", "20", "--seconds", "0")
    assert [(c["batch"], c["way"]) for c in data["cases"]] == [(1, "usual"), (2, "usual")]
    assert "it is for CUDA" in data["why_not"] and "it is for CUDA" in decoding.tables(data)[0].note
    for c in data["cases"]:
        check_spread(c["step"])
        assert c["share"] == pytest.approx(c["bytes"] / data["limits"]["bytes"] / c["step"]["median"])
    assert data["cases"][0]["bytes"] < data["cases"][1]["bytes"]
    assert "batch 2, usual kernels" in conclusion(data)


def test_curves_has_accuracy_and_both_costs(out):
    options = ["--n", "4", "--tasks", "pope", "gqa", "--methods", "VTW", "Downsample", "--seconds", "0"]
    data = run(curves, out, *options)
    assert data["samples"] == {"pope": 4, "gqa": 4}
    points = {(p["method"], p["setting"]): p for p in data["points"]}
    assert len(points) == 1 + 11 + 4
    for p in points.values():
        assert 0 <= p["accuracy"] <= 1
        assert p["accuracy"] == pytest.approx(sum(p["by_task"].values()) / 2)
        assert p["time_low"] <= p["time"] <= p["time_high"]
    costs = [points["VTW", f"after {layer}"]["flops"] for layer in range(11)]
    assert costs == sorted(costs) and costs[-1] < points["KeepAll", ""]["flops"] == 1.0
    assert points["KeepAll", ""]["time"] == 1.0
    assert points["VTW", "after 3"]["exit_layer"] == 3


@pytest.fixture
def repository(tmp_path):
    """The folders and the pages that the documents' command writes into."""
    for folder in ("docs/benchmarks", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs" / "nano.md").write_text(NANO_PAGE)
    (tmp_path / "docs" / "again.md").write_text("<!-- again: begin -->\n<!-- again: end -->\n")
    return tmp_path


def _first_token(data, method):
    case = next(c for c in data["cases"] if c["method"] == method)
    return f"{case['speedup']['1']['median']:.2f}"


def test_page_is_made_of_the_results(out, repository, compared):
    document.main(["--results", str(out), "--root", str(repository)])
    page = repository / "docs" / "benchmarks.md"
    text = page.read_text()
    case = next(c for c in compared["cases"] if c["method"] == "FastV")
    detail = (repository / "docs" / "benchmarks" / "policies.md").read_text()
    assert policies.milliseconds(case["prefill"]) in detail
    assert compared["command"] in detail
    assert f"KeepAll is {_first_token(compared, 'KeepAll')} times as fast to the first token" in detail
    assert f"- [policies](benchmarks/policies.md): {conclusion(compared)}" in text
    plot = repository / "docs" / "benchmarks" / "policies.png"
    plot.unlink()
    page.unlink()
    document.main(["--root", str(repository)])  # from the records alone
    assert page.read_text() == text
    assert plot.is_file()


def test_readme_quotes_the_records(out, repository, compared):
    document.main(["--results", str(out), "--root", str(repository)])
    text = (repository / "README.md").read_text()
    assert text.startswith("before\n<!-- speed: begin -->\n") and text.endswith("<!-- speed: end -->\nafter\n")
    assert "outdated" not in text
    lines = [line.split(" | ")[1:] for line in text.splitlines() if line.startswith(f"| {compared['args']['model']}")]
    # DyVTE at layer 1 is the same exit as DyVTE's here
    assert [line[0] for line in lines] == [summary.OTHER, *summary.METHODS]
    case = next(c for c in compared["cases"] if c["method"] == "DyVTE" and c["batch"] == 1)
    ratios = [case["prefill_speedup"], case["speedup"]["1"], case["per_token_speedup"]]
    assert lines[2][1:5] == ["1.0", *(f"{r['median']:.2f}" for r in ratios)]
    text = (repository / "docs" / "nano.md").read_text()
    assert "old" not in text
    assert "| easy-VQA test half, all | 9,673 | 99.9 % | 99.8 - 99.9 % | 67.0 % |" in text
    assert "| generated scenes | 1,000 | 98.7 % | 97.8 - 99.2 % | 6.5 | 8 |" in text


def test_readme_has_a_table_for_each_machine(compared):
    other = [c | {"exit_layer": 0.0} if c["method"] == "DyVTE" else c for c in compared["cases"]]
    on_gpu = compared | {"machine": compared["machine"] | {"gpu": "H100"}, "cases": other}
    on_gpu["date"] = "2999-01-01 00:00 UTC"
    half = on_gpu | {
        "machine": on_gpu["machine"] | {"commit": "v1-3-gdef"},
        "args": on_gpu["args"] | {"dtype": "float16"},
    }
    fewer = half | {"machine": half["machine"] | {"commit": "never"}, "cases": [c | {"batch": 2} for c in other]}
    second, first = summary.speed([compared, half, fewer, on_gpu])
    assert first.title == f"{compared['machine']['cpu']}, {compared['machine']['threads']} threads, commit {COMMIT}"
    assert second.title == f"H100, commit {COMMIT}, v1-3-gdef"
    methods = [summary.OTHER, "KeepAll", "DyVTE", "DyVTE at layer 1", "DyVTE+FastV"]
    assert [row[1] for row in second.rows] == 2 * methods
    assert [row[0].split(", ")[-1] for row in second.rows] == 5 * ["float16"] + 5 * ["float32"]
    front = summary.readme(README, [("a", compared), ("b", half), ("c", on_gpu)])  # the GPU's in 16 bits
    assert [line.split(" | ")[:2] for line in front.splitlines() if line.startswith("| ") and ", float" in line] == [
        [f"| {compared['args']['model']}, float16", method] for method in (summary.OTHER, *summary.METHODS)
    ]
    with pytest.raises(ValueError, match="speed: begin"):
        summary.readme("no marks", [])


def test_page_tells_the_gpu_and_its_driver(compared):
    machine = compared["machine"] | {"device": "cuda", "gpu": "H100", "driver": "550.54"}
    on_gpu = compared | {"machine": machine}
    assert "; H100, driver 550.54, " in document.record_page("policies", on_gpu)
    assert "No result of a GPU" not in document.overview_page([("policies", on_gpu)])
    assert "No result of a GPU" in document.overview_page([("policies", compared)])


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"commit": ""}, "commit"),
        ({"device": "cuda:0", "gpu": "H100"}, "driver"),
        ({"torch": "", "device": "cuda", "driver": "550.54"}, "torch, gpu"),
    ],
)
def test_a_record_says_where_it_was_measured(compared, repository, tmp_path, changed, told):
    path = tmp_path / "policies.json"
    path.write_text(json.dumps(compared | {"machine": compared["machine"] | changed}))
    with pytest.raises(ValueError, match=f"does not tell {told} "):
        document.take(path, repository)
    assert not list((repository / "benchmarks" / "results").iterdir())


def test_versus_runs_what_it_can_and_says_what_it_cannot(checkpoint, out, tmp_path):
    """Both workers that need no other environment; those of the others cannot be made."""
    broken = ["--build", str(tmp_path / "file")]
    (tmp_path / "file").write_text("a file where the folder should be")
    data = run(versus, out, "--model", checkpoint, "--new-tokens", "3", "--rounds", "3", "--seconds", "0", *broken)
    assert list(data["engines"]) == [
        "transformers, float32",
        "this engine, KeepAll, float32",
        "this engine, KeepAll, bfloat16",
    ]
    assert list(data["missing"]) == ["OpenVINO GenAI", "llama.cpp"]
    assert all("venv" in why for why in data["missing"].values())
    assert all(e["first"]["n"] == 3 for e in data["engines"].values())
    assert all(e["same_text"] == 1.0 for name, e in data["engines"].items() if name.endswith("float32"))
    with pytest.raises(SystemExit):
        versus.main(["--dtype", "bfloat16"])
    assert "not measured" in versus.tables(data)[0].rows[-1][1]
    assert "25814" not in versus.tables(data)[0].note
    data["engines"]["llama.cpp, float32"] = data["engines"]["transformers, float32"]
    assert "25814" in versus.tables(data)[0].note


def test_versus_arithmetic():
    def answers(first, whole, text):
        return [{"first": {"seconds": first}, "whole": {"seconds": whole}, "ended": {"text": text}}] * 2

    found = versus.figures(answers(0.1, 0.3, "b"), answers(0.2, 1.0, "a"), new_tokens=5)
    assert found["per_token"]["median"] == pytest.approx(0.05)
    assert found["speedup"]["per_token"]["median"] == pytest.approx(4)
    assert found["speedup"]["first"]["median"] == pytest.approx(2)
    assert found["same_text"] == 0.0


def test_pages_in_the_repository_are_those_of_its_records():
    found = document.records(document.ROOT)
    assert found
    readme = (document.ROOT / "README.md").read_text()
    assert readme == summary.readme(readme, found)
    own = (document.ROOT / "docs" / "nano.md").read_text()
    assert own == summary.nano(own)
    docs = document.ROOT / "docs"
    assert (docs / "benchmarks.md").read_text() == document.overview_page(found)
    asked = (docs / "again.md").read_text()
    assert asked == document.again_page(asked, found)
    shown = [(name, data) for name, data in found if data["benchmark"] != document.OWN_PAGE]
    assert all((docs / "benchmarks" / f"{name}.md").read_text() == document.record_page(name, d) for name, d in shown)
    files = sorted(p.name for p in (docs / "benchmarks").iterdir())
    assert files == sorted([f"{name}.png" for name, _ in found] + [f"{name}.md" for name, _ in shown])


def test_conclusions_say_what_the_records_say():
    """Three of them, against figures read off the tables."""
    found = dict(document.records(document.ROOT))
    first = min(versus.tables(found["versus"])[0].rows, key=lambda row: float(row[1].split()[0]))
    assert f"first token: {first[0]}, {first[1].split()[0]} ms" in conclusion(found["versus"])
    rows = {row[0]: row for row in capacity.tables(found["capacity"])[0].rows}
    assert f"{rows['DyVTE'][3]} with DyVTE (" in conclusion(found["capacity"])
    points = [p for p in found["curves"]["points"] if p["method"] == "DyVTE" and p["accuracy"] >= 0.666]
    assert f"{100 * min(p['flops'] for p in points):.0f} % of the FLOPs" in conclusion(found["curves"])


def test_decisions_compares_ways_to_ask_for_one_exit(checkpoint, out):
    data = run(decisions, out, "--model", checkpoint, "--batch", "2", "--exit", "2", "--seconds", "0")
    cases = {c["method"]: c for c in data["cases"]}
    asked = {name: c["asked"] for name, c in cases.items() if "paper" in name}
    assert list(asked.values()) == [3, 2, 3, 3]
    assert cases["KeepAll"]["asked"] == cases[decisions.NOBODY]["asked"] == 0
    heads = 2 * (2 * 64 * 32) + 2 * 2 * 32
    assert all(cases[name]["head_bytes"] == 2 * heads for name in asked)  # float32
    assert cases["light heads"]["head_bytes"] == 4 * (2 * 64 * 32 + 2 * 32 + 32)
    for c in cases.values():
        check_spread(c["seconds"])
        assert c["extra"]["n"] == c["seconds"]["n"]
    with pytest.raises(SystemExit, match="--exit is 3; accepted: 0 to 2"):
        run(decisions, out, "--model", checkpoint, "--batch", "1", "--exit", "3", "--seconds", "0")


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_forced_heads_exit_where_they_are_told(layer, light):
    engine, _ = build()
    texts, images = tiny.prompts(seed=7, n=4, images=(1, 2))
    engine.policy = workload.forced_exit(engine, layer, light)
    assert [r.stats.exit_layer for r in engine.generate(texts, images, chat=False, max_new_tokens=1)] == [layer] * 4
