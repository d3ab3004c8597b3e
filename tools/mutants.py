"""Mutation testing: changes the package at one place after another and asks the tests whether they notice.

    python tools/mutants.py [PATH ...] [--sample N [--seed S]] [--results FILE]

PATH is a file or a folder of dyvte_engine/, default those of TESTS. Mutants: comparisons, arithmetic and logic swapped,
`not` and unary minus left out, whole numbers plus one, truth values turned, min and max swapped, a `raise` or the value
of a `return` left out. Each runs in a copy of the tree, in a fork of a process that has torch and transformers loaded,
with the tests of its file, until the first failure or the time limit (both count as noticed). A mutant of an unchanged
file that is in the results (outputs/mutants.jsonl) is not run again: a killed run continues.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "mutants"

# The tests of a file or a folder, quick ones first; the longest name that fits counts. Paths that are not there are
# left out.
TESTS = {
    "dyvte_engine/flops.py": ("tests/eval/test_flops.py", "tests/engine/test_exit.py"),
    "dyvte_engine/engine.py": ("tests/serve/test_hooks.py", "tests/engine"),
    "dyvte_engine/hf.py": ("tests/families/test_host.py", "tests/families/test_hf.py"),
    "dyvte_engine/heads": ("tests/policies/test_rule.py", "tests/training/test_calibration.py"),
    "dyvte_engine/heads/calibration.py": ("tests/policies/test_arguments.py", "tests/training/test_calibration.py"),
    "dyvte_engine/heads/stopping.py": ("tests/training/test_stopping.py",),
    "dyvte_engine/heads/exit_head.py": (
        "tests/policies/test_heads.py",
        "tests/policies/test_arguments.py",
        "tests/engine/test_errors.py",
        "tests/training/test_train_heads.py",
    ),
    "dyvte_engine/inputs": ("tests/inputs", "tests/engine/test_errors.py", "tests/families/test_videos.py"),
    "dyvte_engine/inputs/splice.py": ("tests/policies/test_methods.py", "tests/families/test_families.py"),
    "dyvte_engine/models/decoder.py": ("tests/engine", "tests/families/test_families.py"),
    "dyvte_engine/models/rows.py": (
        "tests/policies/test_heads.py",
        "tests/policies/test_methods.py",
        "tests/engine/test_exit.py",
        "tests/families/test_families.py",
    ),
    "dyvte_engine/policies": (
        "tests/policies/test_arguments.py",
        "tests/policies/test_methods.py",
        "tests/policies/test_shared.py",
        "tests/engine/test_exit.py",
    ),
    "dyvte_engine/policies/dynamic.py": (
        "tests/policies/test_rule.py",
        "tests/policies/test_methods.py",
        "tests/training/test_calibration.py",
        "tests/engine/test_scheduler.py",
        "tests/engine/test_exit.py",
    ),
    "dyvte_engine/runtime": (
        "tests/engine/test_memory.py",
        "tests/engine/test_scheduler.py",
        "tests/engine/test_exit.py",
        "tests/engine/test_errors.py",
        "tests/engine",
        "tests/families/test_hf.py",
    ),
    "dyvte_engine/runtime/kv_cache.py": (
        "tests/engine/test_memory.py",
        "tests/engine/test_prefix.py",
        "tests/engine/test_scheduler.py",
        "tests/engine/test_exit.py",
    ),
    "dyvte_engine/runtime/prefill.py": (
        "tests/engine/test_memory.py",
        "tests/engine/test_exit.py",
        "tests/policies/test_shared.py",
        "tests/engine/test_misuse.py",
        "tests/engine/test_scheduler.py",
    ),
    "dyvte_engine/runtime/running.py": (
        "tests/policies/test_arguments.py",
        "tests/engine/test_memory.py",
        "tests/engine/test_errors.py",
        "tests/engine/test_scheduler.py",
    ),
    "dyvte_engine/runtime/scheduler.py": (
        "tests/engine/test_scheduler.py",
        "tests/engine/test_misuse.py",
        "tests/engine/test_errors.py",
        "tests/families/test_videos.py",
    ),
    "dyvte_engine/runtime/sequence.py": (
        "tests/engine/test_memory.py",
        "tests/engine/test_scheduler.py",
        "tests/engine/test_keep_all.py",
        "tests/engine/test_sampling.py",
    ),
    "dyvte_engine/runtime/worker.py": ("tests/engine/test_scheduler.py", "tests/engine/test_misuse.py"),
    "dyvte_engine/training/labels.py": (
        "tests/training/test_labels.py",
        "tests/families/test_labels.py",
        "tests/training/test_label_store.py",
    ),
    "dyvte_engine/training/train_heads.py": ("tests/training/test_train_heads.py",),
}

SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """`was`, the text from `start` to `end` (bytes) of a file with this digest, becomes `now`."""

    file: str
    digest: str
    line: int
    start: int
    end: int
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.was!r} -> {self.now!r}"


def changes(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Nodes, and the text that takes their place."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare():
                for i, op in enumerate(node.ops):
                    turned = copy.deepcopy(node)
                    turned.ops[i] = SWAPPED[type(op)]()
                    yield node, f"({ast.unparse(turned)})"
            case ast.BinOp() | ast.BoolOp() if type(node.op) in SWAPPED:
                turned = copy.deepcopy(node)
                turned.op = SWAPPED[type(node.op)]()
                yield node, f"({ast.unparse(turned)})"
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                yield node, f"({ast.unparse(node.operand)})"
            case ast.Constant(value=bool(value)):
                yield node, str(not value)
            case ast.Constant(value=int(value)):
                yield node, str(value + 1)
            case ast.Call(func=ast.Name(id="min" | "max" as name)):
                yield node.func, "max" if name == "min" else "min"
            case ast.Raise():
                yield node, "pass"
            case ast.Return(value=ast.expr()):
                yield node, "return None"


def mutants(file: Path) -> list[Mutant]:
    content = file.read_bytes()
    digest, tree = hashlib.sha256(content).hexdigest()[:12], ast.parse(content)
    starts = [0]
    for line in content.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    hints = {id(part) for node in ast.walk(tree) for part in _no_code(node)}
    found = []
    for node, now in changes(tree):
        if id(node) in hints:
            continue
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        was = content[start:end].decode()
        found.append(Mutant(str(file.relative_to(ROOT)), digest, node.lineno, start, end, was, now))
    return sorted(set(found), key=lambda m: (m.start, m.end, m.now))


def _no_code(node: ast.AST) -> Iterator[ast.AST]:
    """Annotations, the texts of errors (what they say is not what is tested), and `strict` of `zip`, a mere check."""
    strict = isinstance(node, ast.keyword) and node.arg == "strict" and node.value
    parts = (
        getattr(node, "annotation", None),
        getattr(node, "returns", None),
        isinstance(node, ast.JoinedStr) and node,
        strict,
    )
    for part in filter(None, parts):
        yield from ast.walk(part)


def tests_of(file: str) -> tuple[str, ...]:
    fitting = [name for name in TESTS if file == name or file.startswith(f"{name}/")]
    return tuple(test for test in TESTS[max(fitting, key=len)] if (ROOT / test).exists()) if fitting else ()


def passed(tests: tuple[str, ...], limit: float) -> tuple[str, float]:
    """ "passed", "failed" or "timeout" of the tests on the copy as it is, and the seconds they took."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(COPY)
        sys.path.insert(0, str(COPY))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        import pytest

        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not gpu", *tests])) != 0)
    while time.monotonic() < began + limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "passed" if status == 0 else "failed", time.monotonic() - began
        time.sleep(0.02)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return "timeout", limit


def run(wanted: list[Mutant], results: Path) -> list[Mutant]:
    """Those that no test noticed."""
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    outcomes = {Mutant(**{k: v for k, v in entry.items() if k != "outcome"}): entry["outcome"] for entry in known}
    limits: dict[tuple[str, ...], float] = {}
    results.parent.mkdir(parents=True, exist_ok=True)
    for number, mutant in enumerate(wanted, 1):
        if mutant in outcomes:
            continue
        tests, target = tests_of(mutant.file), COPY / mutant.file
        content = target.read_bytes()
        if tests not in limits:
            outcome, seconds = passed(tests, 3600)
            if outcome != "passed":
                raise SystemExit(f"{mutant.file}: its tests {tests} fail as they are")
            limits[tests] = 3 * seconds + 10
        target.write_bytes(content[: mutant.start] + mutant.now.encode() + content[mutant.end :])
        outcomes[mutant] = passed(tests, limits[tests])[0]
        target.write_bytes(content)
        with results.open("a") as file:
            file.write(json.dumps(asdict(mutant) | {"outcome": outcomes[mutant]}) + "\n")
        print(
            f"{number}/{len(wanted)} {mutant.file}:{mutant.line} {outcomes[mutant]}: {mutant.was!r} -> {mutant.now!r}"
        )
    return [mutant for mutant in wanted if outcomes[mutant] == "passed"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="*", default=list(TESTS))
    parser.add_argument("--sample", type=int, help="so many mutants of all, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--results", type=Path, default=ROOT / "outputs" / "mutants.jsonl")
    args = parser.parse_args()
    files = {p for path in args.paths for p in ([ROOT / path] if path.endswith(".py") else (ROOT / path).rglob("*.py"))}
    wanted = [m for file in sorted(files) if file.exists() for m in mutants(file) if tests_of(m.file)]
    if args.sample is not None:
        wanted = random.Random(args.seed).sample(wanted, min(args.sample, len(wanted)))
    shutil.rmtree(COPY, ignore_errors=True)
    for name in ("dyvte_engine", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, COPY / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", COPY)
    sys.dont_write_bytecode = True  # a mutant may be written within the second in which the one before it was read
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.llava.modeling_llava  # noqa: F401

    left = run(wanted, args.results)
    for mutant in left:
        print("nobody notices", mutant)
    print(f"{len(wanted) - len(left)} of {len(wanted)} mutants noticed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
