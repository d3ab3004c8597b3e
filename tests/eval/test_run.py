"""Tasks through the engine: answers, figures, resuming, and the command."""

import json

import pytest
from typer.testing import CliRunner

from dyvte_engine import NANO_HEADS, DynamicExit, Engine, FixedExit, KeepAll, flops
from dyvte_engine.commands.main import app
from dyvte_engine.errors import InvalidArgumentError
from dyvte_engine.eval import load_tasks, run
from dyvte_engine.eval.report import markdown, summarise


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano", device="cpu", max_batch=5, max_len=256)


@pytest.fixture(scope="module")
def task(engine):
    return load_tasks(["mmvet"], seed=4, limit=16)[0].within(run.known_forms(engine.model))[0]


@pytest.mark.parametrize("policy", [KeepAll(), FixedExit(4), DynamicExit.from_file(NANO_HEADS)], ids=str.__class__)
def test_answers_are_the_engines_one_by_one(engine, task, policy):
    answers = run.answer_all(engine, task.samples, policy, "p")
    vision = flops.vision_flops(engine.model.hf.config.vision_config)
    for sample, answer in list(zip(task.samples, answers))[:4]:
        alone = engine.generate(sample.prompt, sample.picture, policy=policy, max_new_tokens=run.BUDGETS[sample.form])
        assert (answer.key, answer.text) == (sample.key, alone.text.strip())
        assert answer.exit_layer == alone.stats.exit_layer
        shape, last = engine.model.shape, engine.model.shape.num_layers - 1
        layer = last if answer.exit_layer is None else answer.exit_layer
        left = flops.leaving_flops(shape, answer.tokens, alone.stats.visual_tokens, layer, vision)
        assert answer.flops == pytest.approx(left)
        assert answer.flops_keep_all == pytest.approx(flops.leaving_flops(shape, answer.tokens, 0, last, vision))
        assert answer.flops_true < answer.flops


class Counting:
    def __init__(self, engine):
        self.engine, self.config, self.asked = engine, engine.config, []

    def generate(self, prompts, *args, **options):
        self.asked += prompts
        return self.engine.generate(prompts, *args, **options)


def test_a_killed_run_goes_on(engine, task, tmp_path):
    path, name = tmp_path / "answers.jsonl", engine.model.fingerprint
    whole = run.answer_all(engine, task.samples, FixedExit(4), "fixed:4", run.AnswerFile(path, name))
    text = path.read_text()
    assert len(text.splitlines()) == 1 + len(task.samples)
    path.write_text("\n".join(text.split("\n")[:4]) + "\n" + text.split("\n")[4][:20])  # killed while writing
    counting = Counting(engine)
    again = run.answer_all(counting, task.samples, FixedExit(4), "fixed:4", run.AnswerFile(path, name))
    assert again == whole and len(counting.asked) == len(task.samples) - 3
    assert sorted(path.read_text().splitlines()) == sorted(text.splitlines())
    counting.asked.clear()
    run.answer_all(counting, task.samples, FixedExit(4), "another policy", run.AnswerFile(path, name))
    assert len(counting.asked) == len(task.samples)


def test_answers_of_another_model_are_refused(tmp_path):
    run.AnswerFile(tmp_path / "a.jsonl", "one")
    with pytest.raises(InvalidArgumentError, match="another model"):
        run.AnswerFile(tmp_path / "a.jsonl", "two")


NUMBERS = '"text": "", "exit_layer": 1, "tokens": 3, "flops": 1.0, "flops_keep_all": 2.0, "flops_true": 1.0'


@pytest.mark.parametrize(
    "line",
    [
        '{"policy": "a", "key": [1], "flops_true_keep_all": 2.0, ' + NUMBERS + "}",
        '{"policy": "a", "key": "b", ' + NUMBERS + "}",
        *("{", "[]", "3", "[" * 100_000, "\xff"),
    ],
)
def test_a_damaged_answer_is_named(line, tmp_path):
    file = run.AnswerFile(tmp_path / "a.jsonl", "one")
    file.add("fixed", [run.Answer("a", "text", None, 3, 1.0, 2.0, 1.0, 2.0)])
    assert run.AnswerFile(tmp_path / "a.jsonl", "one").known == file.known
    text = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_bytes(text.encode() + line.encode("latin-1") + b"\n")
    with pytest.raises(InvalidArgumentError, match=r"answers: line 3 of .*a\.jsonl is damaged"):
        run.AnswerFile(tmp_path / "a.jsonl", "one")


def test_summary(task):
    def answer(i, layer):
        return run.Answer(task.samples[i].key, "yes" if i else "no", layer, 160, 2.0 + i, 4.0, 1.0, 2.0)

    n = len(task.samples)
    answers = [answer(i, None if i == 0 else 3 + i % 2) for i in range(n)]
    first = [answer(i, None) for i in range(1, n)] + [answer(1, None)]
    result = summarise(task, answers, 12, first)
    layers = [11, *(3 + i % 2 for i in range(1, n))]
    assert result["exit_layer"] == pytest.approx(sum(layers) / n) and result["never_left"] == 1
    assert sum(result["exit_histogram"].values()) == n - 1
    assert result["same_as_first"] == pytest.approx((n - 1) / n)
    assert result["flops"] == pytest.approx(2.0 + (n - 1) / 2) and result["n"] == n


def test_command(tmp_path):
    out, page = tmp_path / "deep" / "report.json", tmp_path / "page.md"
    asked = ["eval", "nano", "--tasks", "pope,sqa", "--limit", "6", "--policy", "keep-all", "--policy", "four=fixed:4"]
    result = CliRunner().invoke(app, [*asked, "--device", "cpu", "--out", str(out), "--page", str(page)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["tasks"]["sqa"] | {"policies": {}} == report["tasks"]["sqa"]
    assert report["tasks"]["sqa"]["left_out"] == {"multiple choice": 6}
    four = report["tasks"]["pope"]["policies"]["four"]
    assert four["exit_layer"] == 4 and four["n"] == 6
    assert four["flops"] < four["flops_keep_all"] == report["tasks"]["pope"]["policies"]["keep-all"]["flops"]
    assert "out of range" in result.output and "pope: f1, n 6" in page.read_text()
    assert f"{four['flops'] / 1e9:.2f}" in markdown(report, "")


def test_policies_are_told_apart_by_their_files(tmp_path):
    from dyvte_engine.eval.named import named

    heads = tmp_path / "heads.safetensors"
    heads.write_bytes(NANO_HEADS.read_bytes())
    one = named(f"light=dynamic:{heads},0.5", "nano")
    assert one.name == "light" and one.policy.threshold == 0.5
    assert named(f"dynamic:{heads},0.5", "nano").identity == one.identity
    assert named("auto", "nano").name == "auto"
    content = heads.read_bytes()
    heads.write_bytes(content[:-2] + bytes(2))  # another last weight
    assert named(f"dynamic:{heads},0.5", "nano").identity != one.identity
