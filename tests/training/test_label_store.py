"""`label`: its columns against transformers' own masked runs, its inputs, its modes, and what a kill leaves."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from dyvte_engine import Engine, EngineConfig
from dyvte_engine.commands.main import app
from dyvte_engine.errors import DataError, InvalidArgumentError
from dyvte_engine.flops import paper_flops, vision_flops
from dyvte_engine.runtime.prefill import Prefill
from dyvte_engine.training import label_store
from dyvte_engine.training.answers import branch_answers
from dyvte_engine.training.files import read_tensors, write_tensors
from dyvte_engine.training.head_data import Example, fingerprint, from_dataset, read_examples
from dyvte_engine.training.label_store import LabelInfo, label, load_labels
from dyvte_engine.training.train_heads import HeadSettings, train_heads
from tests import tiny

LAYERS, WIDTH = 4, 64
STATES = ("mean_visual", "last_visual", "mean_text", "last_text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint `model` and 11 examples `data.jsonl`, pictures beside it."""
    root = tmp_path_factory.mktemp("labels")
    tiny.save(root / "model", seed=3)
    rng = random.Random(0)
    lines = []
    for number in range(11):
        tiny.picture(rng).save(root / f"{number}.png")
        words = [f"w{rng.randrange(tiny.WORDS)}" for _ in range(rng.randint(2, 9))]
        answer = " ".join(f"w{rng.randrange(tiny.WORDS)}" for _ in range(rng.randint(1, 4)))
        lines.append(json.dumps({"image": f"{number}.png", "prompt": " ".join(words), "answer": answer}))
    (root / "data.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def loaded(folder: Path):
    """The model as `label` takes it, and an untouched twin for the oracle."""
    return Engine.from_pretrained(folder / "model", dtype="float32", device="cpu", max_batch=1).model, tiny.model(
        seed=3
    )


def columns(folder: Path) -> dict[str, torch.Tensor]:
    parts = [read_tensors(folder / name)[0] for name in LabelInfo.read(folder).shards]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def entry(loaded, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    model, hf = loaded
    text = f"user : <image> {example.prompt} assistant :"
    embeds, visual, _ = tiny.embed(hf, model.processor, text, [example.load()])
    return embeds, visual


def hidden_after(visual: torch.Tensor, layer: int):
    n = len(visual)
    return lambda number: visual.expand(n, n) & (number > layer)


def test_columns_are_those_of_a_masked_run_for_each_layer(folder, loaded, tmp_path) -> None:
    model, hf = loaded
    examples = read_examples(folder / "data.jsonl")
    label(model, examples, tmp_path / "out", "reference", batch=4, shard=4)
    found = columns(tmp_path / "out")
    data, info = load_labels(tmp_path / "out", STATES)
    assert (info.samples, len(info.shards), data.pooled.shape) == (11, 3, (11, LAYERS, 4 * WIDTH))
    verdicts = set()
    for i, example in enumerate(examples):
        embeds, visual = entry(loaded, example)
        answer = torch.tensor([*model.processor.tokenizer(example.answer).input_ids, 2])
        embeds = torch.cat([embeds, hf.get_input_embeddings()(answer)])
        visual = torch.cat([visual, torch.zeros(len(answer), dtype=torch.bool)])
        runs = [
            tiny.masked_logits(hf, embeds, hidden_after(visual, layer))[-len(answer) - 1 : -1].log_softmax(-1)
            for layer in range(LAYERS)
        ]
        ce = [F.nll_loss(run, answer) for run in runs]
        for layer, run in enumerate(runs):
            same = (run.argmax(-1) == runs[-1].argmax(-1)).float().mean()
            kl = (runs[-1].exp() * (runs[-1] - run)).sum(-1).mean()
            assert found["agreement"][i, layer] == same
            torch.testing.assert_close(found["ce_exit"][i, layer], ce[layer], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(found["kl"][i, layer], kl, rtol=1e-3, atol=1e-4)
            assert data.label[i, layer] == (same > 0.99 and ce[layer] < 1.03 * ce[-1])
            assert data.agree[i, layer] == (same == 1)
            verdicts.add(bool(data.label[i, layer]))
        torch.testing.assert_close(found["ce_full"][i], ce[-1], rtol=1e-3, atol=1e-4)
        prompt, pictures = len(visual) - len(answer), int(visual.sum())
        rows = [[prompt] * (layer + 1) + [prompt - pictures] * (LAYERS - 1 - layer) for layer in range(LAYERS)]
        tower = vision_flops(hf.config.vision_config)
        assert data.flops[i].tolist() == pytest.approx([paper_flops(model.shape, r, tower) for r in rows])
    assert verdicts == {False, True}


@pytest.mark.parametrize("mode", ["self", "free-running"])
def test_own_answers(folder, loaded, tmp_path, mode) -> None:
    """The references and the strings under every exit, against transformers without a cache."""
    model, hf = loaded
    examples = read_examples(folder / "data.jsonl")[:5]
    given = [Example(e.picture, e.prompt, None, e.name) for e in examples] if mode == "self" else examples
    label(model, given, tmp_path / "out", mode, batch=8, shard=3, max_new_tokens=4)
    found = columns(tmp_path / "out")
    differing = set()
    for i, example in enumerate(examples):
        embeds, visual = entry(loaded, example)
        generated = [
            tiny.masked_greedy(hf, embeds, visual, 4, lambda k, layer=layer, v=visual: v & (k > layer))
            for layer in range(LAYERS)
        ]
        answer = torch.tensor(generated[-1])
        with_answer = torch.cat([embeds, hf.get_input_embeddings()(answer)])
        logits = tiny.masked_logits(hf, with_answer, tiny.see_all(len(with_answer)))[-len(answer) - 1 : -1]
        torch.testing.assert_close(found["ce_full"][i], F.cross_entropy(logits, answer), rtol=1e-3, atol=1e-4)
        if mode == "free-running":
            texts = [model.processor.tokenizer.decode(ids, skip_special_tokens=True).lower() for ids in generated]
            assert found["same_text"][i].tolist() == [text == texts[-1] for text in texts]
            assert found["right"][i].tolist() == [text == example.answer for text in texts]
            differing |= set(found["same_text"][i].tolist())
    assert mode == "self" or differing == {False, True}
    data, _ = load_labels(tmp_path / "out", ["last_text"])
    assert torch.equal(data.label, found["same_text"] if mode == "free-running" else found["agreement"] == 1)
    assert (data.right is None) == (mode == "self")


def test_a_picture_is_computed_once_for_all_its_questions_and_exits(folder, loaded, monkeypatch) -> None:
    """Rows that pass through the layers of prefills: a picture and what comes before it once, a question L times."""
    model, hf = loaded
    engine = Engine(model, EngineConfig(torch.device("cpu"), torch.float32, max_batch=4, max_len=256))
    rows, layer = [], model.decoder.layer

    def watched(number, hidden, x, of):
        rows.extend([len(hidden)] if isinstance(of, Prefill) else [])
        return layer(number, hidden, x, of)

    monkeypatch.setattr(model.decoder, "layer", watched)
    pictures = [tiny.picture(random.Random(seed)) for seed in (1, 1, 2, 1, 2)]
    questions = ["w1 w2", "w3", "w4 w5 w6", "w7 w8", "w9"]
    answers = branch_answers(engine, [f"user : <image> {q} assistant :" for q in questions], pictures, 3)
    head, own = 2, sum(len(q.split()) + 2 for q in questions)
    assert sum(rows) == LAYERS * (2 * (head + tiny.VISUAL_TOKENS) + LAYERS * own)
    for question, picture, found in zip(questions, pictures, answers, strict=True):
        embeds, visual, _ = tiny.embed(hf, model.processor, f"user : <image> {question} assistant :", [picture])
        gone = [lambda k, layer=layer, v=visual: v & (k > layer) for layer in range(LAYERS)]
        assert found == [tiny.masked_greedy(hf, embeds, visual, 3, of) for of in gone]


def test_answers_are_compared_without_case_and_blanks(folder, loaded, tmp_path, monkeypatch) -> None:
    model, _ = loaded
    monkeypatch.setattr(
        model.processor.tokenizer, "batch_decode", lambda rows, **_: [f" A{' ' * i}b " for i in range(len(rows))]
    )
    example = read_examples(folder / "data.jsonl")[0]
    label(model, [Example(example.picture, "w1", "a  B", "it")], tmp_path / "out", "free-running", max_new_tokens=3)
    found = columns(tmp_path / "out")
    assert found["same_text"][0].tolist() == [False] + [True] * (LAYERS - 1)  # "ab" is another word
    assert found["right"][0].tolist() == [False] + [True] * (LAYERS - 1)


def test_readers_agree(folder, tmp_path) -> None:
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    conversations = [
        {
            "image": line["image"],
            "conversations": [
                {"from": "human", "value": "<image>\n" + line["prompt"]},
                {"from": "gpt", "value": line["answer"]},
                {"from": "human", "value": "and a second turn"},
            ],
        }
        for line in lines
    ]
    (tmp_path / "llava.json").write_text(json.dumps([{"conversations": []}, *conversations]))
    plain, llava = read_examples(folder / "data.jsonl"), read_examples(tmp_path / "llava.json", images=folder)

    class Rows:  # the part of datasets.Dataset that is used
        column_names = tuple(lines[0])

        def __getitem__(self, key):
            table = [line | {"image": Image.open(folder / line["image"])} for line in lines]
            return [row[key] for row in table] if isinstance(key, str) else table[key]

    rows = from_dataset(Rows(), answer="answer")
    for other in (llava, rows):
        assert [(e.prompt, e.answer) for e in other] == [(e.prompt, e.answer) for e in plain]
        assert [e.load().tobytes() for e in other] == [e.load().tobytes() for e in plain]
    with pytest.raises(DataError, match="no column question"):
        from_dataset(Rows(), prompt="question")
    for other in ({"train": Rows()}, [], iter([])):  # splits, no rows, a stream
        with pytest.raises(DataError, match=r"without a row 0; accepted: a datasets\.Dataset"):
            from_dataset(other)
    assert fingerprint(plain) == fingerprint(read_examples(folder / "data.jsonl")) != fingerprint(plain[:-1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2 of bad.jsonl: Expecting value"),
        ('{"prompt": "w1"}', "line 2 of bad.jsonl: KeyError 'image'"),
        ('{"image": "none.png", "prompt": "w1"}', "line 2 of bad.jsonl: .*none.png is not a readable picture"),
        ('{"image": "data.jsonl", "prompt": "w1"}', "line 2 of bad.jsonl: .*data.jsonl is not a readable picture"),
        ('{"image": "0.png", "prompt": " "}', "line 2 of bad.jsonl: prompt is ' '; accepted: text"),
        ('{"image": "0.png", "prompt": "w1", "answer": 3}', "line 2 of bad.jsonl: answer is 3; accepted"),
        ("[" * 100_000, "line 2 of bad.jsonl: it is nested too deep"),
    ],
)
def test_bad_lines_are_named(folder, line, message) -> None:
    good = (folder / "data.jsonl").read_text().splitlines()[0]
    (folder / "bad.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(DataError, match=f"1 unusable entries:\n{message}"):
        read_examples(folder / "bad.jsonl")


def test_what_cannot_be_labelled_is_refused(folder, loaded, tmp_path) -> None:
    model, _ = loaded
    example = read_examples(folder / "data.jsonl")[0]
    with pytest.raises(InvalidArgumentError, match="mode is 'paper'; accepted: reference, self, free-running"):
        label(model, [example], tmp_path / "a", "paper")
    with pytest.raises(DataError, match="needs answers; 1 examples have none, first here"):
        label(model, [Example(example.picture, "w1", None, "here")], tmp_path / "a")
    with pytest.raises(DataError, match="here: 621 tokens of prompt and answer; accepted: at most max_len 512"):
        label(model, [Example(example.picture, "w1 " * 599, "w1", "here")], tmp_path / "b")
    with pytest.raises(DataError, match="here: the prompt has 2 <image> marks for 1 pictures"):
        label(model, [Example(example.picture, "<image> <image> w1", "w1", "here")], tmp_path / "c")
    torn = tmp_path / "torn.png"
    tiny.picture(random.Random(1)).resize((300, 300)).save(torn)
    torn.write_bytes(torn.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"here: .*torn.png\) cannot be decoded"):
        label(model, [Example(torn, "w1", "w1", "here")], tmp_path / "d")
    with pytest.raises(DataError, match="holds 0 of 1 shards"):
        load_labels(tmp_path / "d", ["last_text"])
    with pytest.raises(DataError, match="is not a folder of labels"):
        load_labels(tmp_path / "nothing", ["last_text"])
    label(model, [example], tmp_path / "e")
    with pytest.raises(DataError, match="rule 'text' needs labels of mode free-running"):
        load_labels(tmp_path / "e", ["last_text"], "text")
    with pytest.raises(DataError, match="samples: 1 there, 2 asked"):
        label(model, [example, example], tmp_path / "e")
    (tmp_path / "e" / "shard-00000.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"shard-00000.safetensors is not a readable file"):
        load_labels(tmp_path / "e", ["last_text"])


@pytest.fixture(scope="module")
def labelled(folder, loaded, tmp_path_factory) -> tuple[Path, list[Example]]:
    """Five examples in three shards."""
    examples, out = read_examples(folder / "data.jsonl")[:5], tmp_path_factory.mktemp("labelled") / "out"
    label(loaded[0], examples, out, batch=2, shard=2)
    return out, examples


@pytest.mark.parametrize("name", ["samples", "shard", "batch"])
@pytest.mark.parametrize("value", [None, True, 0, -1, 1.5, "3", [1], float("nan")])
def test_counts_that_are_none_are_no_labels(labelled, tmp_path, name, value) -> None:
    info = json.loads((labelled[0] / "labels.json").read_text())
    (tmp_path / "labels.json").write_text(json.dumps(info | {name: value}))
    with pytest.raises(DataError, match=rf"is not a folder of labels .*: {name} is "):
        load_labels(tmp_path, ["last_text"])


def test_what_else_is_no_labels(labelled, tmp_path) -> None:
    for text in ("", "null", "[]", "3", "{}", "[" * 100_000):
        (tmp_path / "labels.json").write_text(text)
        with pytest.raises(DataError, match="is not a folder of labels"):
            load_labels(tmp_path, ["last_text"])
    shutil.copytree(labelled[0], tmp_path / "more")
    info = json.loads((labelled[0] / "labels.json").read_text())
    (tmp_path / "more" / "labels.json").write_text(json.dumps(info | {"samples": 10**15}))
    with pytest.raises(DataError, match="holds 3 of 500000000000000 shards"):
        load_labels(tmp_path / "more", ["last_text"])


def swap(a: Path, b: Path) -> None:
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def another_run(a: Path, b: Path) -> None:
    tensors, header = read_tensors(a)
    write_tensors(a, tensors, header | {"run": header["run"] | {"model_fingerprint": "0"}})


def flip_a_bit(a: Path, b: Path) -> None:
    content = bytearray(a.read_bytes())
    content[-5] ^= 1
    a.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap, "shard-00000.safetensors does not hold samples 0 and on of this run; remove it"),
        (another_run, "shard-00000.safetensors does not hold samples 0 and on of this run; remove it"),
        (flip_a_bit, "shard-00000.safetensors is damaged: its content does not fit its checksum"),
        (lambda a, b: a.write_bytes(a.read_bytes()[:-9]), "shard-00000.safetensors is not a readable file"),
    ],
)
def test_damaged_shards_are_refused_on_reading_and_on_resuming(labelled, loaded, tmp_path, damage, message) -> None:
    out, examples = labelled
    shutil.copytree(out, tmp_path / "out")
    names = LabelInfo.read(out).shards
    damage(*(tmp_path / "out" / name for name in names[:2]))
    with pytest.raises(DataError, match=message):
        load_labels(tmp_path / "out", ["last_text"])
    (tmp_path / "out" / names[2]).unlink()
    with pytest.raises(DataError, match=message):
        label(loaded[0], examples, tmp_path / "out", batch=2, shard=2)
    assert not (tmp_path / "out" / names[2]).exists(), "nothing is labelled before the rest is known to be sound"


def test_pooled_states_lie_in_the_order_that_heads_take_them(labelled) -> None:
    """However they are named: mean visual, last visual, mean text, last text."""
    out, _ = labelled
    found = columns(out)
    for states in (STATES[::-1], ("last_text", "mean_visual"), ("last_text", "last_visual", "mean_text")):
        want = torch.cat([found[f"pooled.{name}"] for name in STATES if name in states], -1)
        assert torch.equal(load_labels(out, states)[0].pooled, want)


def test_labels_that_hold_nan_are_neither_written_nor_read(labelled, loaded, tmp_path, monkeypatch) -> None:
    out, examples = labelled
    shutil.copytree(out, tmp_path / "read")
    path = tmp_path / "read" / LabelInfo.read(out).shards[1]
    sound, header = read_tensors(path)
    for name in ("pooled.mean_text", "pooled.last_visual", "ce_exit", "ce_full", "flops"):
        broken = {key: tensor.clone() for key, tensor in sound.items()}
        broken[name].view(2, -1)[1, 0] = float("inf" if name == "flops" else "nan")
        write_tensors(path, broken, header)
        with pytest.raises(
            DataError, match=rf"shard-00001.safetensors: {name} holds NaN or infinity in 1 of 2 samples"
        ):
            load_labels(tmp_path / "read", ["last_text"])
        with pytest.raises(DataError, match="shard-00001"):
            train_heads(tmp_path / "read", tmp_path / "h", HeadSettings.of("light", target_agreement=0.5))
    assert not list(tmp_path.glob("h*"))
    run = label_store.exit_outcomes

    def overflowing(*args):
        outcomes = run(*args)
        outcomes.pooled["mean_text"][0, 2] = float("nan")
        return outcomes

    monkeypatch.setattr(label_store, "exit_outcomes", overflowing)
    with pytest.raises(DataError, match=r"shard-00000.safetensors: pooled.mean_text holds NaN or infinity in 1 of 2"):
        label(loaded[0], examples, tmp_path / "written", batch=2, shard=2)
    assert [p.name for p in (tmp_path / "written").iterdir()] == ["labels.json"]


def test_counts_below_one_are_refused(folder, loaded, tmp_path) -> None:
    for samples in ("0", "-1"):
        words = [
            "label",
            folder / "model",
            "--data",
            folder / "data.jsonl",
            "--out",
            tmp_path / "a",
            "--samples",
            samples,
        ]
        result = CliRunner().invoke(app, [str(w) for w in words])
        assert result.exit_code != 0
        assert isinstance(result.exception, InvalidArgumentError)
        assert str(result.exception) == f"samples is {samples}; accepted: at least 1"
    examples = read_examples(folder / "data.jsonl")
    for name in ("batch", "shard", "max_new_tokens"):
        with pytest.raises(InvalidArgumentError, match=f"{name} is 0; accepted: at least 1"):
            label(loaded[0], examples, tmp_path / "a", **{name: 0})
    with pytest.raises(DataError, match="examples is empty; accepted: at least one"):
        label(loaded[0], [], tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_fingerprint_of_the_data_sees_all_of_an_example() -> None:
    """Anything that changes a label makes it other data: the answer, the prompt, the picture, the order."""
    one, two = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    rows = [
        Example(Path("a/1.png"), "w1", "w2", "line 1"),
        Example(Path("a/1.png"), "w1", "w3", "line 1"),
        Example(Path("a/1.png"), "w1", None, "line 1"),
        Example(Path("a/1.png"), "w4", "w2", "line 1"),
        Example(Path("a/2.png"), "w1", "w2", "line 1"),
        Example(Path("a/1.png"), "w1", "w2", "line 2"),
        Example(one, "w1", "w2"),
        Example(two, "w1", "w2"),
        Example(one, "w1", "w3"),
    ]
    assert len({fingerprint([row]) for row in rows}) == len(rows)
    assert fingerprint(rows[:2]) != fingerprint(rows[1::-1])
    assert fingerprint([Example(Path("b/1.png"), "w1", "w2", "line 1")]) == fingerprint(rows[:1]), "a folder may move"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


KILLED = """
import sys
from dyvte_engine import Engine, EngineConfig
from dyvte_engine.training.head_data import read_examples
from dyvte_engine.training.label_store import label
root, out = sys.argv[1:]
model = Engine.from_pretrained(root + "/model", dtype="float32", device="cpu", max_batch=1).model
print("begin", flush=True)
label(model, read_examples(root + "/data.jsonl"), out, "free-running", batch=1, shard=1, max_new_tokens=3)
"""


def test_killed_at_any_moment_it_ends_in_the_same_bytes(folder, loaded, tmp_path) -> None:
    model, _ = loaded
    examples = read_examples(folder / "data.jsonl")
    started = time.monotonic()
    label(model, examples, tmp_path / "whole", "free-running", batch=1, shard=1, max_new_tokens=3)
    whole = time.monotonic() - started
    rng, kills = random.Random(0), 0
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed")]
    for attempt in range(20):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout.readline() == b"begin\n"
            try:
                process.wait(rng.uniform(0, whole / 3) if attempt < 2 else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
                continue
        assert process.returncode == 0
        break
    assert kills >= 1
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
