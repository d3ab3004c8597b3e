"""Calls the engine with random odd arguments: `python -m tests.fuzz [--calls N] [--seconds S] [--seed S]`.

A call ends in a right answer or in a DyvteError. A finding is anything else: another exception, a wrong answer, more
than 20 s, more than 2 GiB, pages of the cache still held afterwards, an end of the process. Each is printed once with
the number that repeats it: `python -m tests.fuzz --only NUMBER`. Numbers depend on the seed, not on what ran before.
"""

from __future__ import annotations

import argparse
import ast
import gc
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 20, 2 << 30


class Hang(BaseException):
    """Not an Exception, so that no handler in between takes it for one."""


def _stop(number: int, frame: Any) -> None:
    raise Hang(f"more than {SECONDS} s")


def _place(error: BaseException) -> str:
    """Where it came up: the innermost frame in the package, else in the call."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/dyvte_engine/" in f.filename] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].name}"


def one(number: int, seed: int, world: Any) -> tuple[str, str, str, str] | None:
    """Call `number`; a finding as (call, place, what, arguments)."""
    import torch

    from dyvte_engine import DyvteError
    from tests.fuzz.calls import CALLS

    rng = random.Random(f"{seed}/{number}")
    torch.manual_seed(number)
    make = rng.choices(list(CALLS), list(CALLS.values()))[0]
    call = make(rng, world)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        call.run()
    except DyvteError:
        pass
    except (Exception, Hang) as error:
        return make.__name__, _place(error), f"{type(error).__name__}: {error}".split("\n")[0][:200], call.words
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        if world.engine.pool.bytes_held:
            gc.collect()  # a stream that nobody holds any more
        world.check()
    except Exception as error:
        return make.__name__, "afterwards", f"{type(error).__name__}: {error}".split("\n")[0][:200], call.words
    return None


def work(first: int, calls: int, seconds: float, seed: int) -> None:
    """The child: prints "at NUMBER" before each call and a line for each finding."""
    import transformers

    from tests.fuzz.calls import World

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, _stop)
    talk = os.fdopen(os.dup(1), "w", buffering=1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        world = World(Path(folder))
        data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY, data + MEMORY))
        ends = time.monotonic() + seconds
        for number in range(first, first + calls):
            if time.monotonic() > ends:
                break
            print("at", number, file=talk)
            if found := one(number, seed, world):
                print("found", number, *(ascii(part) for part in found), sep="\t", file=talk)
                if world.engine.pool.bytes_held or found[1] == "afterwards":
                    world = World(Path(tempfile.mkdtemp(dir=folder)))


def run(first: int, calls: int, seconds: float, seed: int) -> dict[tuple[str, str, str], list[tuple[int, str, str]]]:
    """All findings, by call, place and type of error; a child that ends early is one, and another takes over."""
    found: dict[tuple[str, str, str], list[tuple[int, str, str]]] = {}
    last, ends, beyond = first - 1, time.monotonic() + seconds, first + calls
    while last + 1 < beyond and time.monotonic() < ends:
        command = [sys.executable, "-m", "tests.fuzz", "--work", str(last + 1), str(beyond - last - 1)]
        left = str(max(1.0, ends - time.monotonic()))
        quiet = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        child = subprocess.Popen([*command, left, str(seed)], stdout=subprocess.PIPE, text=True, env=quiet)
        assert child.stdout is not None
        for line in child.stdout:
            kind, _, rest = line.strip().partition("\t" if line.startswith("found") else " ")
            if kind == "at":
                last = int(rest)
            elif kind == "found":
                number, call, place, what, words = (ast.literal_eval(part) for part in rest.split("\t"))
                key = (call, place, what.partition(":")[0])
                found.setdefault(key, []).append((int(number), what, words))
        if child.wait() == 0:
            break
        found.setdefault(("process", "ended", str(child.returncode)), []).append(
            (last, f"exit code {child.returncode}", "")
        )
    print(f"{last + 1 - first} calls, seed {seed}: {sum(map(len, found.values()))} findings of {len(found)} kinds")
    return found


def main() -> int:
    if sys.argv[1:2] == ["--work"]:
        first, calls, seconds, seed = sys.argv[2:]
        work(int(first), int(calls), float(seconds), int(seed))
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this call alone")
    args = parser.parse_args()
    only = args.only is not None
    found = run(args.only if only else 0, 1 if only else args.calls, args.seconds, args.seed)
    for (call, place, _), cases in sorted(found.items(), key=lambda entry: -len(entry[1])):
        number, what, words = cases[0]
        print(f"{len(cases)} x {call}, {place}: {what}\n    --seed {args.seed} --only {number}: {words}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
