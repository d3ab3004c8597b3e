"""The words and figures of the page: HTML of answers, savings, comparisons and batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from .charts import leaves, png, small_rows
from .run import Run


def answer(run: Run | None, stopped: bool = False) -> str:
    """The question and what has come of its answer; `stopped`: no more will come."""
    if run is None:
        return '<div class="dy-answer dy-empty">Choose a picture, ask a question, press Enter.</div>'
    text = escape(run.text.strip()) or "…"
    going = "" if run.result or stopped else '<span class="dy-caret" aria-hidden="true"></span>'
    chips = ""
    if run.look is not None:
        kind = "dy-stays" if run.exit_layer is None else "dy-leaves"
        chips = f'<span class="dy-chip {kind}">{leaves(run.exit_layer)}</span>'
    if run.stats is not None:
        chips += f'<span class="dy-chip">{run.stats.new_tokens} tokens</span>'
    return (
        f'<div class="dy-answer"><p class="dy-question">{escape(run.question)}</p>'
        f'<p class="dy-words" aria-live="polite">{text}{going}</p><div class="dy-chips">{chips}</div></div>'
    )


def refused(message: str) -> str:
    """An error of the engine, readable."""
    return f'<div class="dy-error" role="alert"><b>This was refused.</b> {escape(message)}</div>' if message else ""


def examples(pictures: Sequence[tuple[Path, str]]) -> str:
    """A button for each picture and its question."""
    buttons = (
        f'<button type="button" value="{i}" title="{escape(question)}"><img src="{png(Image.open(path), 96)}" '
        f'alt="Example {i + 1}: {escape(question)}"></button>'
        for i, (path, question) in enumerate(pictures)
    )
    return f'<div class="dy-examples" role="group" aria-label="Examples">{"".join(buttons)}</div>'


def note(message: str) -> str:
    return f'<p class="dy-note">{escape(message)}</p>'


def savings(run: Run | None) -> str:
    """What the policy saved against keep-all: K/V, arithmetic, time."""
    if run is None or run.stats is None:
        return ""
    s = run.stats
    tiles = [
        ("K/V memory", s.kv_bytes, s.kv_bytes_keep_all, size),
        ("Prefill FLOPs", s.prefill_tflops_true, s.prefill_tflops_true_keep_all, lambda x: f"{1e3 * x:.2f} GFLOP"),
    ]
    if run.prefill_s is not None:
        tiles.append(("Prefill time", *run.prefill_s, lambda x: f"{1e3 * x:.1f} ms"))
    return '<div class="dy-tiles">' + "".join(_tile(*tile) for tile in tiles) + "</div>"


def _tile(name: str, part: float, whole: float, write: Callable[[float], str]) -> str:
    share = part / whole
    return (
        f'<div class="dy-tile"><h4>{name}</h4><b>{change(part, whole)}</b>'
        f'<div class="dy-meter" aria-hidden="true"><i style="width:{100 * min(share, 1):.1f}%"></i></div>'
        f"<span>{write(part)}</span><span>keep-all {write(whole)}</span></div>"
    )


def change(part: float, whole: float) -> str:
    """In percent, with its sign."""
    value = round(100 * (part / whole - 1))
    return "±0 %" if value == 0 else f"{'+' if value > 0 else '−'}{abs(value)} %"


def size(count: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def comparison(runs: Sequence[Run]) -> str:
    """One line for each policy; answers that differ from the first one's are marked."""
    if not runs:
        return ""
    first = next((run for run in runs if run.error is None), None)
    rows = []
    for run in runs:
        policy = f"<th scope='row'><code>{escape(run.settings.policy)}</code></th>"
        if run.stats is None:
            rows.append(f"<tr>{policy}<td colspan='6'>{refused(run.error or '')}</td></tr>")
            continue
        s, same = run.stats, first is not None and run.text.strip() == first.text.strip()
        mark = (
            ""
            if run is first
            else "<em class='dy-same'>= same</em>"
            if same
            else "<em class='dy-differs'>≠ differs</em>"
        )
        assert run.prefill_s is not None
        cells = [
            f"{escape(run.text.strip())} {mark}",
            "stays" if s.exit_layer is None else f"after {s.exit_layer}",
            small_rows(run),
            change(s.kv_bytes, s.kv_bytes_keep_all),
            change(s.prefill_tflops_true, s.prefill_tflops_true_keep_all),
            change(*run.prefill_s),
        ]
        rows.append(f"<tr>{policy}{_cells(cells, _COMPARED)}</tr>")
    return _table(["policy", *_COMPARED], rows)


_COMPARED = ("answer", "picture leaves", "rows in each layer", "K/V", "FLOPs", "prefill time")
_BATCHED = ("answer", "picture leaves", "rows in each layer", "K/V")


def batch(runs: Sequence[Run]) -> str:
    """One line for each picture, in the given order, under a count of exit layers."""
    if not runs:
        return ""
    rows = []
    for run in runs:
        name = escape(run.name)
        if run.stats is None:
            rows.append(f"<tr><th scope='row'>{name}</th><td colspan='4'>{refused(run.error or '')}</td></tr>")
            continue
        s = run.stats
        picture = f'<img src="{png(run.picture, 96)}" alt="">'
        cells = [
            escape(run.text.strip()),
            "stays" if s.exit_layer is None else f"after {s.exit_layer}",
            small_rows(run),
            change(s.kv_bytes, s.kv_bytes_keep_all),
        ]
        rows.append(f"<tr><th scope='row'>{picture}<small>{name}</small></th>{_cells(cells, _BATCHED)}</tr>")
    return _histogram(runs) + _table(["picture", *_BATCHED], rows)


def _histogram(runs: Sequence[Run]) -> str:
    done = [run.stats for run in runs if run.stats is not None]
    if not done:
        return ""
    layers = len(done[0].tokens_per_layer)
    counts = Counter(s.exit_layer for s in done)
    most = max(counts.values())
    names: list[int | None] = [*([-1] if counts[-1] else []), *range(layers), None]
    bars = "".join(
        f'<div title="{counts[n]} pictures: {leaves(n)}"><b>{counts[n] or ""}</b>'
        f'<i style="height:{60 * counts[n] / most:.0f}px"></i><span>{"stays" if n is None else n}</span></div>'
        for n in names
    )
    return f'<h3>After which layer the pictures left</h3><div class="dy-histogram">{bars}</div>'


def turns(runs: Sequence[Run]) -> str:
    """The questions about one picture, the newest first, with what was known from those before."""
    if not runs:
        return '<div class="dy-empty">Ask twice about one picture: the second question finds its rows computed.</div>'
    legend = (
        '<div class="dy-legend"><span><i class="dy-picture"></i>computed</span><span><i class="dy-reused"></i>'
        'known from before</span><span><i class="dy-gone"></i>left</span></div>'
    )
    return legend + "".join(_turn(len(runs) - i, run) for i, run in enumerate(reversed(runs)))


def _turn(number: int, run: Run) -> str:
    s = run.stats
    assert s is not None
    reused, rows = sum(s.rows_reused), sum(s.tokens_per_layer)
    layers = sum(1 for n in s.rows_reused if n)
    known = (
        f"{reused} of {rows} rows were known, in {layers} of {len(s.rows_reused)} layers"
        if reused
        else _WHY.get(s.prefix, f"nothing was known ({s.prefix})")
    )
    tower = {None: "", 0: ", the vision tower saw it"}.get(s.pictures_reused, ", the vision tower was not asked again")
    return (
        f'<div class="dy-turn"><div><p class="dy-question">{number}. {escape(run.question)}</p><p class="dy-words">'
        f"{escape(run.text.strip())}</p><small>{known}{tower}; first token after {1e3 * s.ttft_s:.0f} ms; "
        f"{leaves(s.exit_layer)}</small></div>{small_rows(run, reuse=True)}</div>"
    )


_WHY = {
    "miss": "the first question about it: all rows were computed",
    "policy": "this policy looks at the question or takes some tokens: its rows cannot be shared",
    "off": "the engine keeps no prefixes here",
    "drop_early_kv": "rows are not shared while early K/V is dropped",
}


def _cells(cells: Sequence[str], names: Sequence[str]) -> str:
    return "".join(f'<td data-name="{name}">{cell}</td>' for name, cell in zip(names, cells, strict=True))


def _table(names: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th scope='col'>{name}</th>" for name in names)
    return f"<table class='dy-table'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
