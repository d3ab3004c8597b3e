"""The paper's tables beside measured figures, through the seam that any benchmark harness may fill."""

import json
from collections.abc import Iterator

import pytest

from dyvte_engine import (
    NANO_HEADS,
    DynamicExit,
    Engine,
    FastV,
    FixedExit,
    HeadsError,
    InvalidArgumentError,
    KeepAll,
    ModelError,
    ToMe,
)
from dyvte_engine.analysis import reproduce, tables
from dyvte_engine.analysis.benchmarks import EXIT_LAYER, FLOPS, DrawnTasks, Measured, heads_policy
from dyvte_engine.analysis.data import load_data
from dyvte_engine.eval import run
from dyvte_engine.eval.report import summarise
from tests.eval.test_flops import CELLS

ABOUT = {"name": "model", "fingerprint": "f", "dtype": "float32", "layers": 12}


class Harness:
    """A harness that knows two benchmarks and makes its figures up; ToMe it cannot run."""

    def __init__(self):
        self.asked = []

    def measure(self, policy, identity, names) -> Iterator[Measured]:
        if isinstance(policy, ToMe):
            raise ModelError("no tower that ToMe knows")
        self.asked.append(identity)
        for task, score in (("gqa", 60.0), ("mme", 1400.0)):
            if task in names:
                shift = 0 if isinstance(policy, KeepAll) else len(self.asked)
                metric = "MME score of 2000" if task == "mme" else "accuracy"
                yield Measured(task, metric, score - shift, 50, (score - 9, score + 9))
                yield Measured(task, EXIT_LAYER, 4.0 + shift, 50, (3.0, 5.0))
                yield Measured(task, FLOPS, 100.0 - shift, 50, (90.0, 100.0))


def test_any_harness_fills_the_tables(tmp_path):
    methods = reproduce.methods(str(NANO_HEADS), "nano", None, [f"other={NANO_HEADS}"])
    assert [m.name for m in methods] == ["without", "with", "ToMe", "FastV", "DyVTE+FastV", "other"]
    assert isinstance(methods[3].policy, FastV) and (methods[3].policy.k, methods[3].policy.r) == (2, 0.5)
    harness = Harness()
    found = reproduce.measure(harness, methods)
    assert len(harness.asked) == 5 and len(set(harness.asked)) == 4  # "other" is the same file here
    assert found.refused == {"ToMe": "no tower that ToMe knows"}
    made = {t.title.split(" (")[0]: t for t in reproduce.write(found, ABOUT, "VILA-7B", tmp_path, "command")}
    assert all(len(row) == len(t.head) for t in made.values() for row in t.rows)
    rows = {row[0]: row[1:] for row in made["Accuracy with and without DyVTE, FLOPs and exit layers"].rows}
    assert len(rows) == 9
    assert rows["GQA"] == [
        *("63.1", "61.9", "62 %", "17.4"),  # 5.5 of 8.8 TFLOPs
        *("gqa: accuracy, n 50", "60.0 (51.0-69.0)", "58.0 (51.0-69.0)", "98 %", "6.0 (3.0-5.0)"),
    ]
    assert rows["MME"][5:7] == ["1400 (1391-1409)", "1398 (1391-1409)"]
    assert rows["POPE"][4:] == ["out of the model's range", "-", "-", "-", "-"]
    peers = made["Peers"]
    assert "no tower that ToMe knows" in peers.note
    assert ["GQA", "DyVTE+FastV", "-", "-", "56.0 (51.0-69.0)", "96 %"] in peers.rows
    assert ["SQA-I", "FastV", "69.0", "63 %", "-", "-"] in peers.rows
    moved = made["Heads of another model"].rows
    assert ["paper: VILA-7B", "LLaVA-7B", "61.3 / 17.1"] in [row[:3] for row in moved]
    assert ["ours: model", "other", "55.0 / 9.0"] in [row[:3] for row in moved]
    assert "not measured" in made["Token states that the heads see"].note
    record = json.loads((tmp_path / "tables.json").read_text())
    assert len(record["measured"]) == 5 * 6 and record["refused"] == found.refused
    assert "| GQA | 63.1 |" in (tmp_path / "tables.md").read_text()
    assert "<td>63.1</td>" in (tmp_path / "tables.html").read_text()


def test_accuracy_after_k_layers_at_equal_depths():
    assert tables.exit_depths("LLaVA-1.5-7B", 12) == {
        "0 of 32": 0,
        "8 of 32": 3,
        "16 of 32": 6,
        "24 of 32": 9,
        "without": 12,
    }
    assert list(tables.exit_depths("LLaVA-1.5-13B", 40).values()) == [0, 8, 16, 24, 32, 40]
    assert tables.exit_depths("VILA-7B", 28) == tables.exit_depths("LLaVA-1.5-7B", 28)
    methods = reproduce.exits_by_hand("LLaVA-1.5-7B", 12)
    assert [m.policy for m in methods] == [FixedExit(k) for k in (-1, 2, 5, 8)] and methods[0].tasks == tables.ABLATED
    found = reproduce.measure(Harness(), methods)
    table = tables.manual_exit(found.figures, "LLaVA-1.5-7B", 12)
    assert table.rows[2][:3] == ["16 of 32, ours 6 of 12", "55.1", "57.0 (51.0-69.0)"]
    assert [row[1] for row in table.rows] == ["29.8", "41.4", "55.1", "61.5", "62.0"] and table.rows[4][2] == "-"


def test_published_flops_are_computed():
    """Within the calculator's known 1.4 %, at each of the 14 published exit layers (the cells of its own test)."""
    rows = tables.published_flops().rows
    assert len(rows) == sum(len(cells) for cells in CELLS["exits"].values()) == 14
    for model, name, full, _, layer, published, computed, off in rows:
        assert CELLS["exits"][model][name] == [float(full), float(layer), float(published)]
        assert abs(float(computed) / float(published) - 1) < 0.016 and abs(float(off.split()[0])) < 1.5


def test_token_states_beside_the_papers():
    measured = [Measured("gqa", "accuracy", 71.25, 9, (0, 0)), Measured("gqa", EXIT_LAYER, 3.5, 9, (0, 0))]
    rows = tables.token_states(tables.Figures({"MT+LT": measured})).rows
    assert len(rows) == 15 and ["MT+LT", "60.0 / 16.4", "71.2 / 3.5", "56.6 / 19.7", "-"] in [row[:5] for row in rows]
    assert [row[2] for row in rows].count("-") == 14


@pytest.fixture(scope="module")
def drawn():
    engine = Engine.from_pretrained("nano", device="cpu", max_batch=8, max_len=256)
    tasks = [t.within(run.known_forms(engine.model))[0] for t in load_data("gqa,mme,sqa", limit=10, seed=5)]
    return DrawnTasks(engine, tasks), tasks


def test_drawn_tasks_are_those_of_eval(drawn):
    benchmarks, tasks = drawn
    policy = DynamicExit.from_file(NANO_HEADS, 0.95)
    figures = tables.Figures({"with": benchmarks.measure(policy, "with", tuple(tables.BENCHMARKS))})
    for task in tasks[:2]:
        answers = run.answer_all(benchmarks.engine, task.samples, policy, "again")
        want = summarise(task, answers, 12, answers)
        score, layer, share = (figures.of("with", task.name, m) for m in (None, EXIT_LAYER, FLOPS))
        scale = 1 if task.name == "mme" else 100
        assert score.value == pytest.approx(scale * want["value"]) and score.n == want["n"]
        assert score.interval == pytest.approx([scale * x for x in want["ci95"]])
        assert (
            layer.value == pytest.approx(want["exit_layer"]) and layer.interval[0] <= layer.value <= layer.interval[1]
        )
        assert share.value == pytest.approx(100 * want["flops"] / want["flops_keep_all"], rel=0.02)
    assert not tasks[2].samples and figures.of("with", "sqa") is None  # nano was never asked in multiple choice


def test_heads_are_told_apart_by_file_and_options():
    """An answers file must not give the answers of one threshold for another."""
    named = [heads_policy(f"{NANO_HEADS}{rest}", "nano") for rest in ("", ",0.5", ",min_layer=3")]
    assert len({identity for _, identity in named}) == 3 and named[1][0].threshold == 0.5 and named[2][0].min_layer == 3
    methods = {m.name: m for m in reproduce.methods(f"{NANO_HEADS},0.5", "nano", None, [])}
    assert methods["with"].identity == named[1][1] and methods["DyVTE+FastV"].policy.parts[1].threshold == 0.5


def test_errors_name_what_is_accepted(tmp_path):
    with pytest.raises(InvalidArgumentError, match="paper-model is 'LLaVA'; accepted: EAGLE-X5-7B, "):
        tables.check_paper_model("LLaVA")
    with pytest.raises(HeadsError, match=r"MV.safetensors is missing; accepted: a folder that `ablate-heads` wrote"):
        reproduce.methods(str(NANO_HEADS), "nano", tmp_path, [])
    with pytest.raises(InvalidArgumentError, match="transfer is 'file'; accepted: NAME=HEADS_FILE"):
        reproduce.methods(str(NANO_HEADS), "nano", None, ["file"])
    for states in tables.paper()["token_states"]["rows"]:
        (tmp_path / f"{states}.safetensors").write_bytes(NANO_HEADS.read_bytes())
    methods = reproduce.methods(str(NANO_HEADS), "nano", tmp_path, [])
    assert len(methods) == 5 + 15 and {m.tasks for m in methods[5:]} == {tables.ABLATED}
