"""The two commands from end to end, resuming, and the page in its two forms."""

import json
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from dyvte_engine import NANO_HEADS
from dyvte_engine.analysis.page import Page
from dyvte_engine.analysis.report import in_turn, rounded
from dyvte_engine.commands.main import app
from dyvte_engine.errors import InvalidArgumentError, SourceError

FIGURES = ("stages", "entropy", "manual_exit", "exit_layers", "timelines")


def invoke(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception is not None:
        raise result.exception
    return result.stdout


ANALYZE = ("analyze", "nano", "--data", "gqa,easy-vqa", "--limit", 4, "--batch", 8, "--device", "cpu", "--max-len", 256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    said = invoke(*ANALYZE, "--exits", "2,7", "--examples", 2, "--out", out)
    assert said.startswith("# Inside nano")
    return out


def test_every_figure_is_written(folder):
    for name in FIGURES:
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 20)) > 20
        assert (folder / f"{name}.svg").read_text().lstrip().startswith("<?xml")
        record = json.loads((folder / f"{name}.json").read_text())
        assert record["model"]["name"] == "nano" and record["rows"]
        assert f"({name}.png)" in (folder / "report.md").read_text()
        assert f'src="{name}.png"' in (folder / "report.html").read_text()
    entropy = json.loads((folder / "entropy.json").read_text())
    assert {row["exit"] for row in entropy["rows"]} == {None, 2, 7} and entropy["samples"] == 8
    assert len(json.loads((folder / "timelines.json").read_text())["rows"]) == 2


def test_a_second_run_computes_nothing_and_says_the_same(folder, monkeypatch):
    from dyvte_engine import Engine

    before = {name: (folder / f"{name}.json").read_text() for name in FIGURES[:4]}
    lines = [(folder / name).read_text() for name in ("answers.jsonl", "attention.jsonl")]

    def refuse(*args, **options):
        raise AssertionError("an answer was computed again")

    monkeypatch.setattr(Engine, "generate", refuse)
    monkeypatch.setattr(Engine, "prefill_prepared", refuse)
    invoke(*ANALYZE, "--exits", "2,7", "--examples", 0, "--out", folder)
    assert [(folder / name).read_text() for name in ("answers.jsonl", "attention.jsonl")] == lines
    assert before == {name: (folder / f"{name}.json").read_text() for name in FIGURES[:4]}


def test_without_heads_the_report_says_so_and_attention_may_be_of_fewer_prompts(tmp_path):
    options = ("--heads", "none", "--exits", "3", "--attention", 2, "--out", tmp_path)
    said = invoke(*ANALYZE[:3], "gqa,pope", *ANALYZE[4:], *options)
    samples = [json.loads((tmp_path / f"{name}.json").read_text())["samples"] for name in FIGURES[:3]]
    assert samples == [4, 4, {"gqa": 4, "pope": 4}] and said.count("Of 4 prompts.") == 2
    assert "No exit heads were given" in said and not (tmp_path / "exit_layers.png").exists()


def test_reproduce_prints_the_tables(tmp_path):
    said = invoke("reproduce", "nano", "--limit", 4, "--device", "cpu", "--max-len", 256, "--out", tmp_path)
    for part in ("SQA-I", "out of the model's range", "MV+LV+MT+LT", "DyVTE+FastV", "paper: InternVL-7B", "computed"):
        assert part in said
    assert {"tables.md", "tables.html", "tables.json", "answers.jsonl"} <= {p.name for p in tmp_path.iterdir()}


def test_reproduce_without_heads_says_what_is_not_measured(tmp_path):
    options = ("--limit", 4, "--device", "cpu", "--max-len", 256, "--out", tmp_path)
    said = invoke("reproduce", "nano", "--heads", "none", "--transfer", f"other={NANO_HEADS}", *options)
    assert "Ours with DyVTE: not measured" in said and "its own" not in said
    record = json.loads((tmp_path / "tables.json").read_text())
    assert {m["method"] for m in record["measured"]} >= {"without", "FastV", "other", "16 of 32"}
    assert not {"with", "DyVTE+FastV"} & {m["method"] for m in record["measured"]}


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (("analyze", "nano", "--exits", "x"), InvalidArgumentError, "exits is 'x'; accepted: layer numbers"),
        (("analyze", "nano", "--data", "sqa"), InvalidArgumentError, "data holds no prompt in a form"),
        (("analyze", "nano", "--data", "nothing"), InvalidArgumentError, "data is 'nothing'; accepted"),
        (("reproduce", "nano", "--paper-model", "x"), InvalidArgumentError, "paper-model is 'x'; accepted"),
    ],
)
def test_errors(tmp_path, args, error, message):
    with pytest.raises(error, match=message):
        invoke(*args, "--limit", 4, "--out", tmp_path)


def test_page_says_the_same_twice():
    page = Page("A & B")
    page.paragraph("see `a<b`")
    page.points(["one", "two"])
    page.table(["x", "y"], [["1 | 2", "`c`"]])
    page.picture("p.png", "what")
    assert page.markdown().split("\n\n") == [
        "# A & B",
        "see `a<b`",
        "- one\n- two",
        "| x | y |\n| --- | --- |\n| 1 \\| 2 | `c` |",
        "![what](p.png)\n",
    ]
    html = page.html()
    for part in (
        "<h1>A &amp; B</h1>",
        "<p>see <code>a&lt;b</code></p>",
        "<li>two</li>",
        "<td>1 | 2</td><td><code>c</code></td>",
        '<img src="p.png" alt="what">',
    ):
        assert part in html


def test_rounded_is_plain_json():
    assert rounded({1: [float("nan"), 0.123456789, None, (True, "a")]}) == {"1": [None, 0.123457, None, [True, "a"]]}


def test_in_turn():
    class Part:
        def __init__(self, *samples):
            self.samples = samples

    assert in_turn([Part(1, 2, 3), Part(4), Part(5, 6)], 5) == [1, 4, 5, 2, 6]


def test_without_matplotlib_a_sentence_says_what_to_install(monkeypatch):
    from dyvte_engine.analysis.plotting import new_figure

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as import finds what is not there
    with pytest.raises(SourceError, match=r"matplotlib is not installed; pip install 'dyvte-engine\[eval\]'"):
        new_figure(1, 1)
