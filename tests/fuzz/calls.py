"""The calls: each takes a random generator and the world, and returns words for its arguments and the call itself.

A call ends in a right answer or in a DyvteError. Where the answer is known it raises AssertionError if it is another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dyvte_engine import DynamicExit, DyvteError, Engine, ExitHeadConfig, ExitHeads, GenerationResult, KeepAll, policies
from dyvte_engine.commands import main as command_line
from dyvte_engine.eval.run import Answer, AnswerFile
from dyvte_engine.heads.calibration import Calibration
from dyvte_engine.inputs.images import load_image, load_video
from dyvte_engine.training.head_data import read_examples
from dyvte_engine.training.label_store import load_labels
from tests import tiny
from tests.fuzz.odd import around, damaged, damaged_json, odd, other, same, varied
from tests.training.test_train_heads import write_labels

QUEUES = hasattr(Engine, "submit")


class Call(NamedTuple):
    words: str
    run: Callable[[], object]


class World:
    """A tiny checkpoint with exit heads, pictures, and an engine that all calls share."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, folder / "model"
        tiny.save(self.model)
        self.heads = folder / "heads.safetensors"
        ExitHeads(ExitHeadConfig(64, 4, head_hidden=16), seed=0).save(self.heads, "", threshold=0.5)
        self.picture = tiny.picture(random.Random(0))
        self.picture.save(folder / "picture.png")
        self.picture.save(folder / "clip.gif", save_all=True, append_images=[self.picture.rotate(90)])
        self.stored = write_labels(folder / "stored", 6)
        AnswerFile(self.stored / "answers.jsonl", "one").add("fixed", [Answer("a", "b", None, 3, 1.0, 2.0, 1.0, 2.0)])
        line = {"image": "picture.png", "prompt": "w1", "answer": "w2"}
        talk = [{"from": "human", "value": "<image>\nw1"}, {"from": "gpt", "value": "w2"}]
        self.picture.save(self.stored / "picture.png")
        (self.stored / "questions.jsonl").write_text(json.dumps(line))
        (self.stored / "questions.json").write_text(json.dumps([{"image": "picture.png", "conversations": talk}]))
        self.engine = Engine.from_pretrained(self.model, dtype="float32", max_batch=3, max_len=96)
        self.embeds, self.mask = torch.randn(20, 64), torch.arange(20).lt(18) & torch.arange(20).ge(2)
        self.answer = self.plain()

    def plain(self) -> list[int]:
        """A call that must give the same tokens whatever was called before it."""
        self.engine.policy = KeepAll()
        result = self.engine.generate("w1 w2", self.picture, max_new_tokens=6)
        assert isinstance(result, GenerationResult)
        return result.token_ids

    def check(self) -> None:
        """Nothing of a call is left: no page of the cache, no other answer."""
        assert self.engine.pool.bytes_held == 0, "pages of the cache are still held"
        assert self.plain() == self.answer, "the next plain call gives another answer"


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"<{value.dtype} {list(value.shape)} {value.device} {value.layout}>"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_short, value[:9]))})"
    if isinstance(value, dict):
        return ", ".join(f"{name}={_short(v)}" for name, v in value.items())
    text = ascii(value)
    return text if len(text) < 200 else f"{text[:200]}..."


def _options(rng: random.Random) -> dict[str, Any]:
    valid = {
        "max_new_tokens": 3, "min_new_tokens": 1, "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9,
        "min_p": 0.1, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "stop_strings": ["w5"], "eos_token_id": 2,
    }  # fmt: skip
    chosen = {name: valid[name] for name in rng.sample(sorted(valid), rng.randint(0, 4))}
    return {"max_new_tokens": 3} | varied(rng, chosen, 1)


def _request(rng: random.Random, world: World) -> dict[str, Any]:
    one = rng.random() < 0.5
    entry = rng.choice((world.picture, str(world.folder / "picture.png"), [world.picture] * 2, None))
    prompts: Any = "w1 w2 w3" if one else ["w1", "w2 w3", "w4 w5"][: rng.randint(0, 3)]
    request = {"prompts": prompts, "images": entry if one else [entry] * len(prompts)}
    request |= {"videos": None, "video_fps": 2.0, "chat": True, "seed": 0, "generation_config": None}
    request |= {"policy": rng.choice((None, "fixed:1", KeepAll()))} if QUEUES else {}
    return varied(rng, request, rng.choice((0, 1, 1, 2))) | _options(rng)


def _is_answer(result: Any) -> None:
    for one in result if isinstance(result, list) else [result]:
        assert isinstance(one, GenerationResult), f"a {type(one).__name__} came back"
        assert len(one.token_ids) == one.stats.new_tokens >= 1 and isinstance(one.text, str)


def generate(rng: random.Random, world: World) -> Call:
    request, context = _request(rng, world), around(rng)

    def run() -> None:
        with context:
            _is_answer(world.engine.generate(**request))

    return Call(f"{_short(request)} under {type(context).__name__}", run)


def plain_elsewhere(rng: random.Random, world: World) -> Call:
    """The plain call under another context of torch's: the same answer."""
    context = around(rng)

    def run() -> None:
        with context:
            assert world.plain() == world.answer, "another answer"

    return Call(type(context).__name__, run)


def stream(rng: random.Random, world: World) -> Call:
    """Left after some tokens, with another stream under way."""
    request, taken, closes = _request(rng, world), rng.randrange(4), rng.random() < 0.5

    def run() -> None:
        chunks = world.engine.stream(**request)
        within = world.engine.stream("w7", max_new_tokens=2)
        for _, chunk in zip(range(taken), chunks, strict=False):
            assert isinstance(chunk.token_id, int)
            next(within, None)
        if closes:
            chunks.close()
        assert all(chunk.text is not None for chunk in within)

    return Call(f"{taken} tokens of {_short(request)}", run)


def submit(rng: random.Random, world: World) -> Call:
    """A request left after some tokens, cancelled or waited for, with another one under way."""
    from dyvte_engine.requests import Request

    request = {"prompt": "w1 w2 w3", "images": world.picture, "videos": None, "video_fps": 2.0, "chat": True, "seed": 0}
    request = varied(
        rng, request | {"policy": None, "priority": 0, "generation_config": None}, rng.choice((0, 1, 1, 2))
    )
    request["options"] = _options(rng) if rng.random() < 0.9 else odd(rng)
    taken, end = rng.randrange(3), rng.choice(("result", "result", "cancel", "leave"))
    wait = rng.choice((None, None, 0, 1e-6, odd(rng)))

    def run() -> None:
        other = world.engine.submit(Request("w1 w2", world.picture, policy=KeepAll(), options={"max_new_tokens": 6}))
        handle = None
        try:
            handle = world.engine.submit(Request(**request))
            for _ in zip(range(taken), handle, strict=False):
                pass
            if end == "cancel":
                handle.cancel()
            if end != "leave":
                with contextlib.suppress(TimeoutError):
                    _is_answer(handle.result(wait))
        finally:
            assert other.result().token_ids == world.answer, "the request next to it gets another answer"
            if handle is not None:  # one that nobody waits for runs on
                handle.cancel()

    return Call(f"{_short(request)}, {taken} tokens, then {end}, waiting {_short(wait)}", run)


def together(rng: random.Random, world: World) -> Call:
    """Calls from three threads: each gets its own answer or its own error."""
    requests = [_request(rng, world) for _ in range(2)]

    def attempt(request: dict[str, Any]) -> None:
        with contextlib.suppress(DyvteError):
            _is_answer(world.engine.generate(**request))

    def run() -> None:
        plain = {"prompts": "w1 w2", "images": world.picture, "max_new_tokens": 6, "policy": KeepAll()}
        with ThreadPoolExecutor(3) as pool:
            odd_ones = [pool.submit(attempt, request) for request in requests]
            assert pool.submit(lambda: world.engine.generate(**plain)).result().token_ids == world.answer, (
                "another answer"
            )
            for one in odd_ones:
                one.result()

    return Call(_short(requests), run)


def prefill(rng: random.Random, world: World) -> Call:
    """Unusual forms of the same numbers give the same logits; then steps with odd tokens, and use after closing."""
    plain = {"inputs_embeds": world.embeds, "visual_mask": world.mask, "position_ids": torch.arange(20)}
    given: dict[str, Any] = {name: same(rng, t) if rng.random() < 0.5 else t for name, t in plain.items()}
    alike = rng.random() < 0.4
    if not alike:
        name = rng.choice(sorted(given))
        given[name] = other(rng, plain[name]) if rng.random() < 0.7 else odd(rng)
    context = around(rng)
    kinds = ("step", "step", "select", "close", "positions")
    then = [(rng.choice(kinds), rng.choice(([3], [0], [5, 6], [-1], [2**40], [], odd(rng)))) for _ in range(3)]

    def run() -> None:
        with context:
            running = world.engine.prefill(**given)
        with running:
            if alike:
                with world.engine.prefill(**plain) as expected:
                    torch.testing.assert_close(running.logits, expected.logits, rtol=1e-3, atol=1e-3)
            for what, value in then:
                if what == "positions":
                    assert running.positions is not None
                else:
                    running.close() if what == "close" else getattr(running, what)(value)
        running.step([1])  # closed: refused

    return Call(f"{_short(given)} under {type(context).__name__}, then {_short(then)}", run)


def from_pretrained(rng: random.Random, world: World) -> Call:
    valid = dict(model=str(world.model), policy=None, dtype="float32", device="cpu", attn_backend="auto", max_batch=2)
    valid |= dict(max_len=64, page_size=16, drop_early_kv=False, graphs=True, pack_weights="auto")
    valid |= dict(fused_decode="auto")
    options = varied(rng, valid | {"trust_remote_code": False})

    def run() -> None:
        engine = Engine.from_pretrained(**options)
        _is_answer(engine.generate("w1", world.picture, max_new_tokens=2))

    return Call(_short(options), run)


def checkpoint(rng: random.Random, world: World) -> Call:
    """A checkpoint with one file damaged: its answer may be another, but it is one, or the error is typed."""
    name = rng.choice(sorted(p.name for p in world.model.iterdir()))
    content = (world.model / name).read_bytes()
    if name.endswith(".json") and rng.random() < 0.8:
        content = json.dumps(damaged_json(rng, json.loads(content))).encode()
    else:
        content = damaged(rng, content)

    def run() -> None:
        with tempfile.TemporaryDirectory(dir=world.folder) as folder:
            for file in world.model.iterdir():
                (Path(folder) / file.name).symlink_to(file)
            (Path(folder) / name).unlink()
            (Path(folder) / name).write_bytes(content)
            engine = Engine.from_pretrained(folder, dtype="float32", max_batch=1, max_len=64)
            _is_answer(engine.generate("w1", world.picture, max_new_tokens=2))

    return Call(f"{name} changed", run)


def parse(rng: random.Random, world: World) -> Call:
    """Notation put together from its pieces, and what it names used on a prompt."""
    numbers = ("0", "1", "2", "-1", "0.5", "1.5", "nan", "inf", "-inf", "1e400", "99999999999999999999", "x", "", " 1 ")
    names = (*policies.POLICIES, "auto", "", "x")
    words = ("keep=2", "target_agreement=0.9", "every_k=0", "min_layer=-1", "hysteresis=9", "x=1", "=", "keep=", "")

    def one() -> str:
        name, parts = rng.choice(names), [rng.choice(numbers) for _ in range(rng.randrange(4))]
        if name == "dynamic" and rng.random() < 0.8:
            parts.insert(0, str(world.heads))
        parts += [rng.choice(words)] if rng.random() < 0.4 else []
        return name + (":" if parts and rng.random() < 0.95 else "") + ",".join(parts)

    text: Any = "+".join(one() for _ in range(rng.choice((1, 1, 1, 2, 3)))) if rng.random() < 0.95 else odd(rng)

    def run() -> None:
        world.engine.policy = policies.parse(text)
        _is_answer(world.engine.generate(["w1", "w2 w3"], [world.picture, None], max_new_tokens=2))

    return Call(_short(text), run)


def policy(rng: random.Random, world: World) -> Call:
    """A policy made with odd arguments, or none at all, and used."""
    kinds = [getattr(policies, name) for name in policies.__all__ if isinstance(getattr(policies, name), type)]
    kinds = [k for k in kinds if issubclass(k, policies.VisualTokenPolicy) and dataclasses.is_dataclass(k)]
    kind = rng.choice([*kinds, None])
    given = {f.name: odd(rng) for f in dataclasses.fields(kind) if f.init and rng.random() < 0.6} if kind else {}
    given |= {"heads": ExitHeads.load(world.heads)} if kind is DynamicExit and rng.random() < 0.8 else {}
    needs = [f.name for f in dataclasses.fields(kind) if f.init and _required(f)] if kind else []
    given = {name: odd(rng) for name in needs} | given
    value = odd(rng)

    def run() -> None:
        world.engine.policy = kind(**given) if kind else value
        _is_answer(world.engine.generate("w1 w2", [world.picture] * 2, max_new_tokens=2))

    return Call(f"{kind.__name__}({_short(given)})" if kind else _short(value), run)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def heads_file(rng: random.Random, world: World) -> Call:
    """A heads file damaged in its bytes, its header or its tensors; or something that is no file."""
    content = world.heads.read_bytes()
    kind = rng.randrange(4)
    if kind == 0:
        content = damaged(rng, content)
    else:
        with contextlib.suppress(Exception):
            content = _other_heads(rng, world, header=kind == 1)
    path = odd(rng) if kind == 3 and rng.random() < 0.5 else world.folder / "damaged.safetensors"

    def run() -> None:
        (world.folder / "damaged.safetensors").write_bytes(content)
        heads = ExitHeads.load(path)
        world.engine.policy = DynamicExit(heads, threshold=0.5)
        _is_answer(world.engine.generate("w1", world.picture, max_new_tokens=2))

    return Call(f"kind {kind}, {_short(path)}", run)


def _other_heads(rng: random.Random, world: World, header: bool) -> bytes:
    size = int.from_bytes(world.heads.read_bytes()[:8], "little")
    words = json.loads(json.loads(world.heads.read_bytes()[8 : 8 + size])["__metadata__"]["dyvte_exit_heads"])
    tensors = load_file(world.heads)
    if header:
        words = damaged_json(rng, words)
    else:
        name = rng.choice([*tensors, "more"])
        tensors[name] = other(rng, tensors.get(name, torch.ones(3))).contiguous()
    path = world.folder / "other.safetensors"
    save_file(tensors, path, metadata={"dyvte_exit_heads": json.dumps(words)})
    return path.read_bytes()


def heads(rng: random.Random, world: World) -> Call:
    """Heads of odd sizes: made, run on their own, saved."""
    valid = dict(hidden_size=8, num_layers=3, head_hidden=4, states=("mean_text",), rms_eps=1e-6, shared=False)
    given = varied(rng, valid)

    def run() -> None:
        made = ExitHeads(ExitHeadConfig(**given), seed=0)
        logits = made(torch.randn(2, 8 * len(made.config.states)), 1)
        assert logits.shape == (2, 2)
        made.save(world.folder / "made.safetensors")
        assert ExitHeads.load(world.folder / "made.safetensors").config == made.config

    return Call(_short(given), run)


def calibration(rng: random.Random, world: World) -> Call:
    p = torch.rand(30, 4)
    valid = {"p_exit": p, "agree": torch.rand(30, 4) > 0.1, "flops": torch.rand(30, 4) + 1, "delta": 0.05}
    given: dict[str, Any] = valid | {"options": {"min_layer": 0, "every_k": 1, "hysteresis": 1}}
    name = rng.choice(sorted(given))
    if name == "options":
        given[name] = varied(rng, given[name])
    else:
        tensor = isinstance(given[name], torch.Tensor) and rng.random() < 0.7
        given[name] = other(rng, given[name]) if tensor else odd(rng)
    target = rng.choice((0.5, 0.9, 0.999, 0, 1, -1, 2, odd(rng)))

    def run() -> None:
        curve = Calibration.measure(**given)
        assert len(curve.limit) == len(curve.thresholds) and all(0 <= x <= 1 for x in curve.limit)
        for call in (curve.for_agreement, curve.for_flops):
            assert curve.at(call(target))["samples"] == curve.samples

    return Call(f"{_short(given)}, target {_short(target)}", run)


def picture(rng: random.Random, world: World) -> Call:
    mode = rng.choice(
        ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "I;16", "RGBa")
    )
    size = rng.choice(((1, 1), (1, 500), (700, 2), (20, 20), (0, 4), (0, 0)))
    name = rng.choice(("picture.png", "clip.gif"))
    content = damaged(rng, (world.folder / name).read_bytes())
    kind, value = rng.randrange(3), odd(rng)
    array = other(rng, torch.zeros(2, 8, 8, 3, dtype=torch.uint8)) if rng.random() < 0.5 else odd(rng)
    load = rng.choice((load_image, load_video))

    def run() -> None:
        (world.folder / f"damaged-{name}").write_bytes(content)
        made = (Image.new(mode, size), world.folder / f"damaged-{name}", array if load is load_video else value)[kind]
        loaded = load(made)
        if load is load_video:
            assert isinstance(loaded, np.ndarray) and loaded.dtype == np.uint8 and loaded.shape[3] == 3
        else:
            assert loaded.mode == "RGB"
            _is_answer(world.engine.generate("w1", loaded, max_new_tokens=1))

    return Call(f"{load.__name__}: {(f'{mode} {size}', name, _short(array), _short(value))[kind]}", run)


def stored(rng: random.Random, world: World) -> Call:
    """A folder of labels, a file of answers or of questions, one of their bytes or entries changed."""
    name = rng.choice(("labels.json", "shard-00000.safetensors", "answers.jsonl", "questions.jsonl", "questions.json"))
    content = (world.stored / name).read_bytes()
    if not name.endswith(".safetensors") and rng.random() < 0.7:
        first, _, rest = content.partition(b"\n" if name == "answers.jsonl" else b"\0")
        changed = json.dumps(damaged_json(rng, json.loads(rest or first))).encode()
        content = first + b"\n" + changed + b"\n" if rest else changed
    else:
        content = damaged(rng, content)

    def run() -> None:
        with tempfile.TemporaryDirectory(dir=world.folder) as there:
            folder = Path(there) / "stored"
            shutil.copytree(world.stored, folder)
            (folder / name).write_bytes(content)
            if name == "answers.jsonl":
                AnswerFile(folder / name, "one")
            elif name.startswith("questions"):
                assert read_examples(folder / name)
            else:
                assert len(load_labels(folder, ["mean_text"])[0].pooled) == 6

    return Call(f"{name}: {_short(content)}", run)


def commands(rng: random.Random, world: World) -> Call:
    """A line with odd options: exit code 0 or 2, one line of error at most from the engine, no traceback."""
    values = (
        "",
        "x",
        "-1",
        "0",
        "1",
        "nan",
        "inf",
        "1e400",
        "99999999999999999999999",
        "\0",
        "/",
        "/dev/null",
        "[b]x[/b]",
    )
    options = {
        "generate": ("--image --video --video-fps --policy --max-new-tokens --temperature --top-k --top-p --min-p "
                     "--repetition-penalty --stop --seed --dtype --device --attn-backend --max-len"),
        "eval": "--tasks --policy --limit --source --styles --seed --out --page --answers --batch --dtype --max-len",
        "train-heads": ("--out --kind --rule --states --delta --hidden --lr --epochs --batch --seed --save-every "
                        "--rms-eps --min-layer --every-k --hysteresis --target-agreement"),
        "label": "--data --out --images --mode --samples --batch --shard --max-len",
        "nothing": "--x",
    }  # fmt: skip
    name = rng.choice((*["generate"] * 4, *options))
    line = [name]
    line += ["--model", str(world.model), "--prompt", rng.choice(("w1", "", *values))] if name == "generate" else []
    line += ["/nowhere"] if name in ("eval", "label") else []
    few = "--out h --hidden 4 --epochs 1 --target-agreement 0.5"  # what is given again below counts
    line += [str(world.stored), *few.split()] if name == "train-heads" else []
    for option in rng.sample(options[name].split(), min(rng.randrange(4), len(options[name].split()))):
        line += [
            option,
            str(world.folder / "picture.png") if option == "--image" and rng.random() < 0.5 else rng.choice(values),
        ]

    def run() -> None:
        before, sys.argv = sys.argv, ["dyvte-engine", *line]
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                command_line.main()
        except SystemExit as stopped:
            assert stopped.code in (0, 2), f"exit code {stopped.code}"
        finally:
            sys.argv = before
        assert "Traceback" not in err.getvalue()

    return Call(_short(line), run)


CALLS = {
    generate: 6, plain_elsewhere: 1, stream: 3, prefill: 6, from_pretrained: 2, checkpoint: 2, parse: 4, policy: 3,
    heads_file: 3, stored: 3, heads: 2, calibration: 3, picture: 3, commands: 2,
}  # fmt: skip
if QUEUES:
    CALLS |= {submit: 5, together: 1}
