"""What the page shows, without a page: runs against the engine's own answers and figures."""

import json
import subprocess
import sys
from itertools import pairwise
from urllib.parse import unquote_plus

import pytest
import torch
from PIL import Image

from dyvte_engine import EXAMPLES, ImageError, InvalidArgumentError, PromptError
from dyvte_engine.commands import main as cli
from dyvte_engine.inspect import charts, figure, link, tables
from dyvte_engine.inspect.run import Inspector, Settings, read_picture

from .conftest import PICTURE, QUESTION

POLICIES = ("auto", "keep-all", "fixed:3", "fixed:-1", "fastv:2,0.5", "fastv:2,0.5+dynamic:auto", "pyramiddrop", "tome")


def last(inspector, policy="auto", **settings):
    *_, run = inspector.ask(QUESTION, read_picture(PICTURE), Settings(policy, **settings), timed=False)
    return run


@pytest.mark.parametrize("policy", POLICIES)
def test_a_look_shows_what_the_request_really_did(inspector, policy):
    run = last(inspector, policy)
    want = inspector.engine.generate(QUESTION, PICTURE, policy=inspector.policy(policy), max_new_tokens=64)
    assert (run.text, run.result.token_ids) == (want.text, want.token_ids)
    look, stats = run.look, want.stats
    assert [t + v for t, v in zip(look.text, look.visual)] == stats.tokens_per_layer
    assert run.exit_layer == stats.exit_layer
    if look.kept is not None:
        assert [int(kept.sum()) for kept in look.kept] == list(look.visual)
    assert (look.kept is None) == (policy == "tome")


@pytest.mark.parametrize("policy", ("auto", "fastv:2,0.5+dynamic:auto"))
@pytest.mark.parametrize("threshold", (0.3, 0.9, 0.97, 0.999))
def test_what_the_heads_say_gives_the_exit_under_every_threshold(inspector, policy, threshold):
    said = torch.tensor([[*last(inspector, policy).look.p_exit, 0.0]])
    run = last(inspector, policy, threshold=threshold)
    layer = int(run.look.rule.first_exits(said)[0])
    assert run.stats.exit_layer == (None if layer == said.shape[1] - 1 else layer)


def test_the_threshold_is_the_heads_own_until_it_is_moved(inspector):
    assert inspector.threshold("auto") == inspector.policy("auto").threshold
    assert inspector.policy("fastv:2,0.5+dynamic:auto", 0.25).parts[1].threshold == 0.25
    assert inspector.threshold("keep-all") is None


def test_a_run_grows_token_by_token_and_its_look_comes_with_the_first(inspector):
    runs = list(inspector.ask(QUESTION, read_picture(PICTURE), Settings()))
    texts = [run.text for run in runs]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert all(run.look is runs[0].look is not None for run in runs)
    assert [run.result is None for run in runs[:-2]] == [True] * (len(runs) - 2)
    assert runs[-2].result is runs[-1].result is not None
    assert runs[-1].prefill_s is not None and all(0 < s < 60 for s in runs[-1].prefill_s)


def test_leaving_a_run_cancels_it(inspector):
    asking = inspector.ask(QUESTION, read_picture(PICTURE), Settings(max_new_tokens=400, policy="fixed:-1"))
    next(asking)
    asking.close()
    load = inspector.engine.load
    assert (load["waiting"], load["prefilling"], load["running"]) == (0, 0, 0)
    inspector.engine.check_integrity()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(question="  "), PromptError, "question is empty"),
        (dict(settings=Settings("maybe")), InvalidArgumentError, "policy 'maybe' is not understood"),
        (dict(settings=Settings("dynamic:/etc/passwd")), InvalidArgumentError, "names a file"),
        (dict(settings=Settings("fastv:2,0.5+dynamic:x.safetensors,0.5")), InvalidArgumentError, "names a file"),
        (dict(settings=Settings(threshold=1.5)), InvalidArgumentError, "threshold is 1.5"),
        (dict(settings=Settings(max_new_tokens=5000)), PromptError, "max_len 2048"),
        (dict(settings=Settings(temperature=-1.0)), InvalidArgumentError, "temperature"),
    ],
)
def test_what_the_engine_refuses_is_refused_before_anything_runs(inspector, change, error, words):
    given = dict(question=QUESTION, picture=read_picture(PICTURE), settings=Settings()) | change
    with pytest.raises(error, match=words):
        next(inspector.ask(**given))


def test_a_heads_file_that_the_page_was_started_with_is_accepted(inspector):
    notation = f"dynamic:{EXAMPLES.parent / 'nano' / 'exit_heads.safetensors'},0.5"
    started = Inspector(inspector.engine, "nano", notation)
    assert started.threshold(notation) == 0.5
    with pytest.raises(InvalidArgumentError, match="names a file"):
        started.policy(notation + "1")


def test_a_comparison_has_each_policys_own_answer_and_marks_those_that_differ(inspector):
    policies = ["keep-all", "auto", "fixed:0", "maybe", "keep-all"]
    runs = inspector.compare(QUESTION, read_picture(PICTURE), Settings(), policies)
    assert [run.settings.policy for run in runs] == policies
    for run in runs[:3]:
        want = inspector.engine.generate(QUESTION, PICTURE, policy=inspector.policy(run.settings.policy))
        assert run.text == want.text
    assert runs[0].prefill_s[0] == runs[0].prefill_s[1], "keep-all is compared with itself"
    assert "not understood" in runs[3].error
    differs = [run.text != runs[0].text for run in runs if run.error is None]
    page = tables.comparison(runs)
    assert page.count("differs</em>") == sum(differs) > 0
    assert page.count("same</em>") == len(differs) - 1 - sum(differs)
    with pytest.raises(InvalidArgumentError, match="0 policies"):
        inspector.compare(QUESTION, read_picture(PICTURE), Settings(), [])


def test_a_batch_is_in_order_of_its_exits_and_says_what_it_could_not_read(inspector, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    files = [*sorted(EXAMPLES.glob("*.png")), bad, *sorted(EXAMPLES.glob("*.png"))[:2]]
    *_, runs = inspector.batch("what color is the shape?", [(f.name, f) for f in files], Settings())
    assert len(runs) == len(files)
    answered = [run for run in runs if run.error is None]
    exits = [float("inf") if run.stats.exit_layer is None else run.stats.exit_layer for run in answered]
    assert exits == sorted(exits) and len(set(exits)) > 1
    for run in answered:
        want = inspector.engine.generate(
            "what color is the shape?",
            EXAMPLES / run.name,
            policy="dynamic:" + str(EXAMPLES.parent / "nano" / "exit_heads.safetensors"),
        )
        assert (run.text, run.stats.exit_layer) == (want.text, want.stats.exit_layer)
    assert runs[-1].error.startswith("picture bad.png: it is not a readable picture")
    assert str(tmp_path) not in tables.batch(runs)
    with pytest.raises(ImageError, match="pictures are missing"):
        next(inspector.batch("what?", [], Settings()))


def test_a_picture_that_claims_to_be_huge_is_refused_unread(tmp_path):
    file = tmp_path / "huge.png"
    Image.new("1", (20000, 20000)).save(file)
    with pytest.raises(ImageError, match="too large"):
        read_picture(file)
    with pytest.raises(ImageError, match="missing"):
        read_picture(None)


def test_a_run_becomes_json_and_a_picture(inspector):
    run = last(inspector)
    record = json.loads(json.dumps(run.record()))
    assert record["answer"] == run.text and record["stats"]["exit_layer"] == run.exit_layer
    assert len(record["attention"]) == 12 and len(record["attention"][0]) == 144
    assert record["attention_grid"] == [12, 12] and len(record["p_exit"]) == 11
    for policy in ("auto", "fixed:3"):
        drawn = figure.draw(last(inspector, policy), 2)
        drawn.canvas.draw()
        assert len(drawn.subfigs[1].axes) == (2 if policy == "auto" else 1)


def test_a_link_brings_the_state_back():
    settings = Settings("fastv:2,0.5+dynamic:auto", 0.75, 32, 0.5, 7)
    state = link.State("3_word", "which word? & <b>", settings, 0)
    query = dict(pair.split("=", 1) for pair in state.query[1:].split("&"))
    assert link.read({k: unquote_plus(v) for k, v in query.items()} | {"__theme": "dark"}) == state
    assert link.read({}) == link.State()


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"threshold": "high"}, "threshold in the link is 'high'; accepted: a number"),
        ({"seed": "1.5"}, "seed in the link is '1.5'; accepted: a whole number"),
        ({"example": "../../etc/passwd"}, "accepted: 1_spatial, 2_count"),
    ],
)
def test_a_link_that_says_something_else_is_refused(query, words):
    with pytest.raises(InvalidArgumentError, match=words):
        link.read(query)


def test_examples_are_known_by_their_content(tmp_path):
    copy = tmp_path / "other name.png"
    copy.write_bytes(PICTURE.read_bytes())
    assert link.example_of(copy) == PICTURE.stem
    copy.write_bytes(PICTURE.read_bytes() + b"x")
    assert link.example_of(copy) is None


def test_words_of_users_are_text(inspector):
    evil = "<script>alert(1)</script>"
    *_, run = inspector.ask(evil, read_picture(PICTURE), Settings(), name=evil, timed=False)
    compared = inspector.compare(evil, read_picture(PICTURE), Settings(), ["keep-all", evil])
    *_, runs = inspector.batch(evil, [(evil, PICTURE), (evil, __file__)], Settings())
    pages = [tables.answer(run), tables.turns([run]), tables.comparison(compared), tables.batch(runs)]
    pages += [tables.refused(evil), tables.examples([(PICTURE, evil)]), charts.layers(run), charts.heat(run, 0)]
    assert [page for page in pages if "<script" in page] == []


def test_charts_show_the_runs_numbers(inspector):
    run = last(inspector)
    shown, rows = charts.layers(run), run.stats.tokens_per_layer
    assert f"the picture leaves after layer {run.exit_layer}. {', '.join(map(str, rows))}" in shown
    assert shown.count("dy-fires") - 1 == sum(p > run.look.rule.threshold for p in run.look.p_exit)  # one: the legend
    crossed = charts.heat(last(inspector, "fastv:2,0.5"), 5)
    assert crossed.count("l.7 .7m") == 72 and "72 of 144 visual tokens are here" in crossed
    assert "if it had stayed" in charts.heat(run, 11)
    again = last(inspector)
    assert f"{sum(again.stats.rows_reused)} of {sum(rows)} rows were known" in tables.turns([again])
    assert sum(again.stats.rows_reused) > 0


@pytest.mark.parametrize(("part", "whole", "words"), [(70, 100, "−30 %"), (112, 100, "+12 %"), (100.2, 100, "±0 %")])
def test_changes_have_their_sign(part, whole, words):
    assert tables.change(part, whole) == words


def test_without_gradio_the_package_works_and_the_command_says_what_is_missing(monkeypatch, capsys):
    blocked = "import sys; sys.modules['gradio'] = None; import dyvte_engine.inspect.run, dyvte_engine.inspect.charts"
    subprocess.run([sys.executable, "-c", blocked], check=True)
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "dyvte_engine.inspect.app", raising=False)
    monkeypatch.setattr(sys, "argv", ["dyvte-engine", "inspect"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "pip install 'dyvte-engine[inspect]'" in capsys.readouterr().err
