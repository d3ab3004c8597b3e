"""What each benchmark shows, in a sentence or two made from its record: how a page of docs/benchmarks opens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from benchmarks.common import Data
from benchmarks.report import number, percent

MARGIN = 0.01  # of score: settings this near to the full model count as equal


def conclusion(data: Data) -> str:
    return _CONCLUSIONS[data["benchmark"]](data)


def _policies(data: Data) -> str:
    cases = [c for c in data["cases"] if c["batch"] == data["cases"][0]["batch"] and "prefill" in c]
    ours = {c["method"]: c for c in cases if not c["method"].startswith("transformers")}
    first = max(ours.values(), key=lambda c: c["speedup"]["1"]["median"])
    text = "; ".join(
        f"{name} is {_times(ours[name]['speedup']['1'])} as fast to the first token, "
        f"{_times(ours[name]['per_token_speedup'])} for each further one"
        for name in ("KeepAll", "DyVTE")
        if name in ours
    )
    return (
        f"Against transformers with SDPA at batch {cases[0]['batch']}: {text}. "
        f"Soonest to the first token: {first['method']}, {_times(first['speedup']['1'])}."
    )


def _curves(data: Data) -> str:
    full = next(p for p in data["points"] if p["method"] == "KeepAll")

    def cheapest(points: Iterable[Data]) -> str:
        kept = [p for p in points if p["accuracy"] >= full["accuracy"] - MARGIN]
        if not kept:
            return "none"
        p = min(kept, key=lambda p: p["flops"])
        return (
            f"{p['method']} {p['setting']}".strip() + f", {percent(p['flops'])} of the FLOPs and {percent(p['time'])}"
        )

    dyvte = cheapest(p for p in data["points"] if p["method"] == "DyVTE")
    return (
        f"The full model scores {number(100 * full['accuracy'])}. Cheapest within {100 * MARGIN:g} point of it: "
        f"{cheapest(data['points'])} of the time; among DyVTE's thresholds: {dyvte} of the time."
    )


def _breakdown(data: Data) -> str:
    full, early = data["methods"]["all stay"], data["methods"]["exit"]

    def ms(method: Data, *parts: str) -> str:
        return number(1e3 * sum(method["parts"][part]["median"] for part in parts))

    layers = ("layers before the exit", "layers after the exit")
    largest = max(early["parts"], key=lambda part: early["parts"][part]["median"])
    whole = [number(1e3 * m["total"]["median"]) for m in (full, early)]
    return (
        f"The exit after layer {data['exit_layer']} takes the prefill's layers from {ms(full, *layers)} to "
        f"{ms(early, *layers)} ms and the request from {whole[0]} to {whole[1]} ms. Asking the heads takes "
        f"{ms(early, 'exit decisions')} ms. The largest part is then {largest}: {ms(early, largest)} ms."
    )


def _decisions(data: Data) -> str:
    batch = data["cases"][0]["batch"]
    extra = {c["method"]: percent(c["extra"]["median"]) for c in data["cases"] if c["batch"] == batch}
    asked = ", ".join(f"{extra[name]} with {name}" for name in ("light heads", "paper's heads"))
    return f"Asking makes a prefill at batch {batch} longer by {asked}; keeping every token, by {extra['KeepAll']}."


def _decoding(data: Data) -> str:
    shown = "; ".join(
        f"batch {c['batch']}, {c['way']} kernels: {number(1e3 * c['step']['median'], 2)} ms, {percent(c['share'])}"
        for c in data["cases"]
    )
    return f"A step's time, and its share of the copy bandwidth: {shown}."


def _growth(data: Data) -> str:
    def power(axis: str, part: str) -> str:
        fits = {f["method"]: f["exponent"] for f in data["axes"][axis]["fits"] if f["part"] == part}
        return " and ".join(f"{number(exponent, 2)} ({method})" for method, exponent in fits.items())

    return (
        f"With visual tokens the prefill's time grows to the power {power('visual tokens', 'prefill')}, a decoded "
        f"token's {power('visual tokens', 'per_token')}, K/V memory {power('visual tokens', 'kv_bytes')}."
    )


def _capacity(data: Data) -> str:
    base, *others = data["cases"]
    shown = [c for c in others if c["method"].startswith("DyVTE")]
    text = ", ".join(
        f"{c['sequences']} with {c['method']} ({_times(c['speedup'])} the answers a second)" for c in shown
    )
    return f"The K/V memory of {base['sequences']} sequences with {base['method']} holds {text}."


def _kernels(data: Data) -> str:
    found = [c["speedup"]["torch"]["median"] for c in data["cases"] if c["speedup"].get("torch")]
    slower = sum(ratio < 1 for ratio in found)
    return (
        f"Of {len(found)} cases {len(found) - slower} are faster than the plain torch form: {number(min(found))} to "
        f"{number(max(found))} times, half of them more than {number(statistics.median(found))} times."
    )


def _versus(data: Data) -> str:
    engines = data["engines"]
    first, whole = (min(engines, key=lambda name: engines[name][part]["median"]) for part in ("first", "whole"))
    return (
        f"Soonest first token: {first}, {number(1e3 * engines[first]['first']['median'])} ms. Soonest whole answer of "
        f"{data['args']['new_tokens']} tokens: {whole}, {number(1e3 * engines[whole]['whole']['median'])} ms."
    )


def _serving(data: Data) -> str:
    best = max(data["cases"], key=lambda c: c["requests_per_s"]["median"])
    return (
        f"Most requests a second: {number(best['requests_per_s']['median'])}, by {best['engine']} under "
        f"the load {best['load']}."
    )


def _times(ratio: Data) -> str:
    return f"{number(ratio['median'], 2)} times"


_CONCLUSIONS: dict[str, Callable[[Data], str]] = {
    "policies": _policies,
    "curves": _curves,
    "breakdown": _breakdown,
    "decisions": _decisions,
    "decoding": _decoding,
    "growth": _growth,
    "capacity": _capacity,
    "kernels": _kernels,
    "versus": _versus,
    "serving": _serving,
}
