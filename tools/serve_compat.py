"""Other people's clients against `dyvte-engine serve nano`, each in an environment of its own in build/serve-compat.

    python -m tools.serve_compat [NAME ...] [--record]

Each is judged by what the engine itself answers to the same questions; nothing is fetched but their packages.
`--record` writes docs/serving/compat.json and its table in docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dyvte_engine
from benchmarks.report import Sheet
from benchmarks.versus import Unavailable, environment
from dyvte_engine import EXAMPLES, Engine
from dyvte_engine.policies.auto import policy_for
from tests.serve.process import ServerProcess
from tools import serve_page

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = ROOT / "tools" / "clients"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}


class Failed(Exception):
    """A client did not come to its end; the message is what it printed last."""


@dataclass(frozen=True)
class Run:
    """Where a client finds its environment, its questions and the server."""

    build: Path
    folder: Path
    address: str
    questions: list[dict[str, Any]]

    def python(self, name: str, *packages: str) -> Path:
        return environment(self.build / name, *packages)

    def call(self, *words: Any, seconds: float = 900, **variables: str) -> str:
        """Its stdout. Raises Failed."""
        variables = {**os.environ, **OFFLINE, "HF_HOME": str(self.folder / "hf"), **variables}
        call = [str(word) for word in words]
        done = subprocess.run(
            call, cwd=self.folder, env=variables, capture_output=True, text=True, timeout=seconds, check=False
        )
        if done.returncode:
            raise Failed(" / ".join((done.stdout + done.stderr).strip().splitlines()[-3:])[:500])
        return done.stdout


def _version(python: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def langchain(run: Run) -> tuple[str, str]:
    python = run.python("langchain", "langchain-openai")
    answers = json.loads(run.call(python, CLIENTS / "langchain_chat.py", run.address, run.folder / "questions.json"))
    for kind in ("whole", "streamed"):
        right = sum(a[kind] == q["with_picture"] for a, q in zip(answers, run.questions, strict=True))
        if right < len(answers):
            raise Failed(f"{kind}: {right} of {len(answers)} answers are the engine's")
    n = len(answers)
    return f"langchain-openai {_version(python, 'langchain-openai')}", f"{n} pictures, whole and streamed: all right"


def lm_eval(run: Run) -> tuple[str, str]:
    python = run.python("lm-eval", "lm_eval[api]", "pillow")
    scores = {}
    for task, model, path in (
        ("nano_completion", "local-completions", "completions"),
        ("nano_text", "local-chat-completions", "chat/completions"),
        ("nano_picture", "local-chat-completions", "chat/completions"),
    ):
        out = run.folder / f"{model}-{task}"
        given = f"model=nano,base_url={run.address}/v1/{path},num_concurrent=4,max_retries=1"
        given += ",tokenizer_backend=None,tokenized_requests=False"
        words = ["-m", "lm_eval", "--model", model, "--model_args", given, "--tasks", task]
        words += ["--include_path", CLIENTS / "lm_eval", "--output_path", out]
        chat = ["--apply_chat_template"] if "chat" in model else []
        run.call(python, *words, *chat)
        results = _results(out)
        scores[f"{model}, {task}"] = results["results"][task]["exact_match,none"]
    return f"lm-eval {_version(python, 'lm_eval')}", _scores(scores)


def _results(out: Path) -> dict[str, Any]:
    """What a harness wrote. Raises Failed."""
    found = list(out.rglob("*results*.json"))
    if not found:
        raise Failed("it wrote no results")
    return json.loads(found[0].read_text())


def _scores(scores: dict[str, float]) -> str:
    wrong = {name: score for name, score in scores.items() if score < 1}
    if wrong:
        raise Failed(f"answers that are not the engine's: {wrong}")
    return "; ".join(f"{name}: all right" for name in scores)


def lmms_eval(run: Run) -> tuple[str, str]:
    python = run.python("lmms-eval", "lmms-eval", "filelock<4", _torch())  # 4 lacks what it imports
    # It comes as a dependency, built for another torch than the one installed, and breaks importing transformers.
    run.call(python, "-m", "pip", "uninstall", "-q", "-y", "torchvision")
    out = run.folder / "lmms"
    given = f"model_version=nano,base_url={run.address}/v1,api_key=none,num_concurrent=4,timeout=60,max_retries=1"
    words = ["-m", "lmms_eval", "--model", "openai", "--model_args", given, "--tasks", "nano_picture"]
    words += ["--include_path", CLIENTS / "lmms_eval", "--output_path", out, "--batch_size", "1"]
    run.call(python, *words)
    results = _results(out)
    score = results["results"]["nano_picture"]["exact_match,none"]
    return f"lmms-eval {_version(python, 'lmms_eval')}", _scores({"nano_picture": score})


def _torch() -> str:
    """The release that is here: no further gigabytes of another one's CUDA packages."""
    import torch

    return f"torch=={torch.__version__.partition('+')[0]}"


def schemathesis(run: Run) -> tuple[str, str]:
    python = run.python("schemathesis", "schemathesis")
    words = ["run", f"{run.address}/openapi.json", "--max-examples", "50", "--seed", "0", "--no-color"]
    words += ["--checks", "not_a_server_error,status_code_conformance"]
    said = run.call(python.parent / "schemathesis", *words)
    found = re.search(r"([\d,]+) generated", said)
    count = found[1] if found else "all"
    return f"schemathesis {_version(python, 'schemathesis')}", f"{count} requests: no server error, no other status"


CLIENTS_BY_NAME: dict[str, Callable[[Run], tuple[str, str]]] = {
    "langchain": langchain,
    "lm-eval": lm_eval,
    "lmms-eval": lmms_eval,
    "schemathesis": schemathesis,
}


def questions(folder: Path) -> list[dict[str, Any]]:
    """The shipped pictures' questions, with what the engine alone answers; also as questions.json in the folder."""
    engine = Engine.from_pretrained("nano", policy_for("auto", "nano"), device="cpu", max_batch=1)
    made = []
    for shipped in json.loads((EXAMPLES / "examples.json").read_text()):
        text, picture = shipped["prompt"], EXAMPLES / shipped["file"]
        made.append(
            {
                "question": text,
                "picture": str(picture),
                "with_picture": engine.generate(text, picture, max_new_tokens=12).text,
                "without_picture": engine.generate(text, max_new_tokens=12).text,
                "continued": engine.generate(text, chat=False, max_new_tokens=12).text,
            }
        )
    (folder / "questions.json").write_text(json.dumps(made))
    return made


def sheets(found: dict[str, Any]) -> list[Sheet]:
    rows = [[one["client"], one["result"]] for one in found["clients"].values()]
    return [Sheet("Clients", ["client", "result"], rows, f"dyvte_engine {found['dyvte_engine']}")]


def keep(name: str, version: str, result: str) -> None:
    """In the record and the page, with those of other clients."""
    known = serve_page.RECORDS / "compat.json"
    clients = json.loads(known.read_text())["clients"] if known.is_file() else {}
    clients[name] = {"client": version, "result": result}
    found = {"dyvte_engine": dyvte_engine.__version__, "clients": dict(sorted(clients.items()))}
    serve_page.write("compat", found, sheets(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CLIENTS_BY_NAME), metavar="NAME", help="clients; default: all")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "serve-compat")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = questions(folder)
        server = ServerProcess(folder / "log", "--device", "cpu")
        failed = False
        try:
            for client in args.names:
                run = Run(args.build.resolve(), folder, server.address, asked)
                try:
                    version, result = CLIENTS_BY_NAME[client](run)
                except (Failed, Unavailable, subprocess.SubprocessError, OSError, LookupError) as error:
                    failed, version, result = True, client, f"FAILED: {type(error).__name__}: {error}"
                print(f"{version}: {result}", flush=True)
                if args.record:
                    keep(client, version, result)
            if server.stop():
                raise Failed(server.log.read_text()[-400:])
        finally:
            server.kill()
    return failed


if __name__ == "__main__":
    sys.exit(main())
