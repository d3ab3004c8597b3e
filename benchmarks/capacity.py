"""How many more sequences fit into the same K/V memory, and what they do in a second when they run together.

Questions are admitted one after another until the page pool is full. A sequence takes pages as its prefill asks for
them, visual rows of the layers before an exit included, and then those of its whole answer: what does not fit with
all that came before, at the peak of its prefill, is not admitted. `python -m benchmarks.capacity --help`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks import roofline, workload
from benchmarks.common import Data, Limits, header, options, paired_ratio, rounds_within, spread, wait_for
from benchmarks.policies import exits
from benchmarks.report import COLORS, Sheet, finish, new_figure, number, percent, scaled
from dyvte_engine import NANO_HEADS, DynamicExit, Engine, FastV, FixedExit, KeepAll, VisualTokenPolicy, compose
from dyvte_engine.errors import CacheError
from dyvte_engine.runtime.decode import DecodeGraphs
from dyvte_engine.runtime.running import Running

BASE = "KeepAll"
CPU_BUDGET = 48  # MiB
GPU_SHARE = 0.85  # of what is free besides weights, heads and prompts; the rest is for activations and graphs


@dataclass(frozen=True, eq=False)
class DrawnExit(DynamicExit):
    """The heads are asked as ever, but sequence b leaves after layer `exits[b]`: mixed exits on random weights."""

    exits: Sequence[int] = ()

    def _leaves(self, state: Any, p_exit: list[float]) -> list[bool]:
        return [bool(n) and state.layer >= layer for n, layer in zip(state.rows.n_visual, self.exits, strict=True)]


def drawn(mean: int, num_layers: int, n: int) -> list[int]:
    """n exit layers around the mean, as narrow as the paper's: hardly any of 7B's before layer 10 (figure 7)."""
    layers = np.random.default_rng(0).normal(mean, num_layers / 16, n).round()
    return layers.clip(0, num_layers - 2).astype(int).tolist()


@dataclass(frozen=True)
class Method:
    """A bound policy, and whether what leaves is taken out of the earlier layers too."""

    policy: VisualTokenPolicy
    drop_early_kv: bool = False


def methods(engine: Engine, model: str, n: int) -> dict[str, Method]:
    """What is compared on n prompts; exits by nano's heads, else forced."""
    layers = engine.model.shape.num_layers
    half = layers // 2 - 1
    mean = workload.PAPER_EXITS.get(model, half)
    asked = DynamicExit.from_file(NANO_HEADS) if model == "nano" else workload.forced_exit(engine, mean)
    dynamic = asked.bind(engine.model)  # once: the paper's heads take 1.7 GB at 13B
    named = {"FastV": FastV(), f"VTW ({half})": FixedExit(half), "DyVTE": dynamic}
    if model != "nano":
        named["DyVTE, mixed exits"] = DrawnExit(dynamic.heads, exits=drawn(mean, layers, n))
    named["DyVTE+FastV"] = compose(FastV(), dynamic)
    whole = {BASE: Method(KeepAll())} | {name: Method(policy) for name, policy in named.items()}
    return whole | {f"{name}, early K/V dropped": Method(policy, True) for name, policy in named.items()}


@dataclass
class Admitted:
    """What fitted: prompt numbers in the groups that were prefilled together, and for each sequence what it took.

    kv_bytes: of prompt and answer. exits: layer of the exit or None. computed, held: [sequence][layer], rows in the
    prefill and after it. most_pages: of the pool, at one time, answers to come included.
    """

    groups: list[list[int]] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    exits: list[int | None] = field(default_factory=list)
    computed: list[list[int]] = field(default_factory=list)
    held: list[list[int]] = field(default_factory=list)
    most_pages: int = 0

    def add(self, group: list[int], part: Running, most_pages: int) -> None:
        self.groups.append(group)
        self.most_pages = max(self.most_pages, most_pages)
        self.kv_bytes += [pages * part.cache.pool.page_bytes for pages in part.cache.claims]
        self.exits += part.exit_layers
        self.computed += np.array(part.rows).T.tolist()
        self.held += part.cache.host_lens.T.tolist()


@dataclass(frozen=True)
class Pool:
    """An engine whose pool is the memory in question, and prompts to fill it with."""

    engine: Engine
    prompts: Sequence[Any]
    group: int
    new_tokens: int
    graphs: dict[int, DecodeGraphs | None] = field(default_factory=dict)  # for each number of sequences

    def prefill(self, method: Method, numbers: Sequence[int]) -> tuple[Running, int]:
        """These prompts, with a claim to the pages of their answers; and the most pages of the pool until then.

        Raises:
            CacheError: they do not fit. Nothing is held then.
        """
        policy, pool = method.policy, self.engine.pool
        if isinstance(policy, DrawnExit):
            policy = replace(policy, exits=[policy.exits[n] for n in numbers])
        prompts = [self.prompts[n] for n in numbers]
        part = self.engine.runner.run(prompts, policy, drop_early_kv=method.drop_early_kv)
        cache, others = part.cache, pool.claimed - sum(part.cache.claims)
        most = others + sum(pool.pages(n) for layer in part.rows for n in layer)  # before anything was compacted away
        try:
            for b, rows in enumerate(cache.host_lens.T + self.new_tokens - 1):  # the last token is not fed
                cache.claim(b, sum(map(pool.pages, rows.tolist())))
        except CacheError:
            part.close()
            raise
        return part, max(most, pool.claimed)

    def nobody(self, slots: int) -> Running:
        """A batch of so many slots; the engine's own graphs end at its `max_batch`."""
        runner = self.engine.runner
        if runner.graphs is None:
            return runner.nobody(slots)
        if slots not in self.graphs:
            self.graphs[slots] = runner.decode_graphs(slots)
        return Running(runner.model.decoder, runner.cache(slots, 0), None, self.graphs[slots], runner.lock)

    @torch.inference_mode()
    def admit(self, method: Method, numbers: Iterable[int]) -> Admitted:
        """Prompts in this order until one does not fit or none is left; in groups, of half the size where one fails."""
        found, parts, size = Admitted(), [], self.group
        queue, waiting = iter(numbers), []
        while waiting := waiting or list(itertools.islice(queue, size)):
            group, waiting = waiting[:size], waiting[size:]
            try:
                part, most = self.prefill(method, group)
            except CacheError:
                waiting, size = group + waiting, size // 2
                if not size:
                    break
            else:
                parts.append(part)
                found.add(group, part, most)
        for part in parts:
            part.close()
        return found

    @torch.inference_mode()
    def run(self, method: Method, groups: Sequence[Sequence[int]]) -> tuple[float, float]:
        """Seconds to the first token of all, and from there to the last: prefill in groups, decoding together."""
        device = self.engine.config.device
        wait_for(device)
        start = time.perf_counter()
        with self.nobody(sum(map(len, groups))) as running:
            for group in groups:
                part, _ = self.prefill(method, group)
                running.join(part.cache, part.logits)
            tokens = running.logits.argmax(-1)
            wait_for(device)
            first = time.perf_counter()
            for _ in range(self.new_tokens - 1):
                tokens = running.step(tokens).argmax(-1)
            wait_for(device)
            return first - start, time.perf_counter() - first


def default_budget(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cpu":
        return CPU_BUDGET << 20
    gc.collect()
    torch.cuda.empty_cache()
    return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])


def prepared(args: argparse.Namespace) -> tuple[Pool, dict[str, Method]]:
    """The pool of the budget on an engine, and what is compared."""
    engine = workload.load(args.model, args.dtype, args.device, args.group, args.new_tokens)
    prompts = engine.prepare(*workload.questions(args.model, args.sets * args.questions))
    compared = methods(engine, args.model, len(prompts))
    model, config, page_bytes = engine.model, engine.config, engine.pool.page_bytes
    del engine  # its pool is part of the budget
    budget = default_budget(config.device) if args.budget is None else int(args.budget * 2**20)
    try:
        within = Engine(model, replace(config, kv_memory=budget // page_bytes * page_bytes))
    except CacheError as error:
        raise SystemExit(f"the K/V budget is too small: {error}") from None
    return Pool(within, prompts, args.group, args.new_tokens), compared


def measure(args: argparse.Namespace, argv: Sequence[str] | None) -> Data:
    data = header("capacity", args, argv)
    limits = Limits(**data["limits"])
    pool, compared = prepared(args)
    pages = pool.engine.pool.n_pages
    data["budget"] = pages * pool.engine.pool.page_bytes
    sets = [range(i * args.questions, (i + 1) * args.questions) for i in range(args.sets)]
    fitted, entries = {}, {}
    for name, method in compared.items():
        if name != BASE and args.methods and name not in args.methods:
            continue
        found = fitted[name] = pool.admit(method, itertools.cycle(sets[0]))
        if not found.groups:
            raise SystemExit(f"the K/V budget of {data['budget'] / 2**20:.1f} MiB holds not one sequence of {name}")
        others = [pool.admit(method, numbers) for numbers in sets[1:]]
        means = [statistics.fmean(a.kv_bytes[: args.questions]) for a in (found, *others)]
        asked = [layer for a in (found, *others) for layer in a.exits[: args.questions]]
        left = [layer for layer in asked if layer is not None]
        entries[name] = {
            "method": name,
            "sequences": len(found.kv_bytes),
            "more": len(found.kv_bytes) / len(fitted[BASE].kv_bytes),
            "kv_bytes": spread(means),
            "filled": found.most_pages / pages,
            "exit_layer": statistics.fmean(left) if left else None,
            "exited": len(left) / len(asked),
        }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in fitted}
    if torch.device(args.device).type == "cuda":
        for name, found in fitted.items():
            pool.run(compared[name], found.groups)  # captures the graphs of decoding
    for _ in rounds_within(args.seconds, args.least):
        for name, found in fitted.items():
            seconds[name].append(pool.run(compared[name], found.groups))
    base = [sum(s) / entries[BASE]["sequences"] for s in seconds[BASE]]
    for name, entry in entries.items():
        entry |= throughput(seconds[name], entry["sequences"], args.new_tokens, base)
        entry["share"] = roofline.share(least(pool, fitted[name], limits), entry["seconds"]["median"])
    data["cases"] = list(entries.values())
    return data


def throughput(seconds: Sequence[tuple[float, float]], sequences: int, new_tokens: int, base: Sequence[float]) -> Data:
    """From (prefill, decoding) of each round; `base` is what a sequence takes without an exit."""
    whole = [sum(s) for s in seconds]
    return {
        "prefill": spread([s[0] for s in seconds]),
        "decode": spread([s[1] for s in seconds]),
        "seconds": spread(whole),
        "sequences_per_s": spread([sequences / t for t in whole]),
        "tokens_per_s": spread([sequences * new_tokens / t for t in whole]),
        "decoded_per_s": spread([sequences * (new_tokens - 1) / s[1] for s in seconds]),
        "speedup": paired_ratio(base, [t / sequences for t in whole]),
    }


def least(pool: Pool, found: Admitted, limits: Limits) -> float:
    """Seconds by the limits: every group's prefill, every step of all sequences."""
    rows, ends = iter(found.computed), [[n + pool.new_tokens // 2 for n in held] for held in found.held]
    groups = [list(itertools.islice(rows, len(group))) for group in found.groups]
    prefill = sum(roofline.prefill_work(pool.engine, group).seconds(limits) for group in groups)
    return prefill + (pool.new_tokens - 1) * roofline.decode_work(pool.engine, ends).seconds(limits)


def tables(data: Data) -> list[Sheet]:
    args, cases = data["args"], data["cases"]
    where = f"{args['model']}, {args['dtype']}, {data['budget'] / 2**20:,.0f} MiB of K/V"
    tokens = args["new_tokens"]
    columns = ["method", "exit after", "K/V MiB a sequence", "sequences", f"x {BASE}", "pool used"]
    rows = [
        [
            c["method"],
            exits(c),
            scaled(c["kv_bytes"], 2**-20, 2),
            str(c["sequences"]),
            number(c["more"], 2),
            percent(c["filled"]),
        ]
        for c in cases
    ]
    note = f"a sequence holds its prompt's pages and those of {tokens} new tokens (median of {args['sets']} sets of "
    note += f"{args['questions']} questions, quartiles); admitted by the peak of its prefill, in which layers before "
    note += "the exit hold the visual rows, early K/V dropped or not; pool used: the most pages at one time; "
    note += "activations are not counted"
    sheets = [Sheet(f"Sequences at equal memory, {where}", columns, rows, note)]
    columns = ["method", "sequences", "prefill, s", "decoding, s", "sequences/s", "tokens/s", "decoded/s"]
    parts = {"prefill": 2, "decode": 2, "sequences_per_s": 1, "tokens_per_s": 0, "decoded_per_s": 0, "speedup": 2}
    rows = [
        [c["method"], str(c["sequences"]), *(scaled(c[p], digits=n) for p, n in parts.items()), percent(c["share"])]
        for c in cases
    ]
    note = f"prefill in groups of {args['group']}, smaller where the pool ends; then all sequences decode together; "
    note += f"without processor and vision; decoded: tokens after the first; x: sequences/s over {BASE}'s, round by "
    note += "round; of the limit: least time by the limits measured over the time taken"
    columns += [f"x {BASE}", "of the limit"]
    return [*sheets, Sheet(f"Throughput of as many as fit, {where}", columns, rows, note)]


def figure(data: Data) -> Figure:
    """How many fit, and how many are answered in a second."""
    cases = data["cases"][::-1]
    fig, axes = new_figure(10, 0.8 + 0.32 * len(cases), columns=2)
    names = [c["method"] for c in cases]
    panels = {
        f"sequences in {data['budget'] / 2**20:,.0f} MiB of K/V": ([c["sequences"] for c in cases], "more"),
        "sequences/s": ([c["sequences_per_s"]["median"] for c in cases], "speedup"),
    }
    for axis, color, (label, (values, ratio)) in zip(axes[0], COLORS, panels.items(), strict=False):
        bars = axis.barh(names, values, color=color)
        ratios = [c[ratio] if isinstance(c[ratio], float) else c[ratio]["median"] for c in cases]
        axis.bar_label(bars, [f"{r:.2f} x" for r in ratios], fontsize=7, padding=2)
        axis.margins(x=0.12)
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0][1].set_yticklabels([])
    fig.suptitle(f"{data['args']['model']}, {data['args']['new_tokens']} new tokens", fontsize=9)
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "capacity")
    parser.add_argument("--model", default="nano", help="nano, a preset (random weights, exits forced), a checkpoint")
    share = f"{100 * GPU_SHARE:.0f} %%"
    parser.add_argument("--budget", type=float, help=f"MiB of K/V; default {CPU_BUDGET}, on a GPU {share} of the free")
    parser.add_argument("--new-tokens", type=int, default=16, help="of every answer, at least 2")
    parser.add_argument("--questions", type=int, default=32, help="of a set; they repeat until the pool is full")
    parser.add_argument("--sets", type=int, default=3, help="of questions; the first one is run")
    parser.add_argument("--group", type=int, default=8, help="sequences prefilled together")
    parser.add_argument("--methods", nargs="+", help=f"besides {BASE}; default: all")
    parser.add_argument("--seconds", type=float, default=15.0, help="for the rounds")
    parser.add_argument("--least", type=int, default=3, help="rounds, however long they take")
    args = parser.parse_args(argv)
    if args.new_tokens < 2:
        parser.error(f"--new-tokens is {args.new_tokens}; accepted: at least 2")
    finish(measure(args, argv), args.out, args.name, tables, figure)


if __name__ == "__main__":
    main()
