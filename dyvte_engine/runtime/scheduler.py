"""Continuous batching: requests join and leave the running batch at every step.

A step is some blocks of a tower or layers of a prefill, then one token for everybody. A request is admitted when a slot
is free and the pool can promise the pages that it needs at worst: all its rows in all layers, but for those that its
policy is sure to take out and those of its prefix that are there already, and its whole answer. Once its exit is known
the promise shrinks to what it will really hold, which admits others.

Where others run and the worst case does not fit, what such requests came to hold so far is promised instead
(`Scheduler._shares`). A group that needs more, since its exits come late, waits between two layers. Nothing is ever
preempted, no running sequence can find the pool empty, and nobody waits for ever:
- Who runs has been promised all it will need, and ends. Then its pages are free.
- One group at a time is on its way through the layers, and only it waits for pages. When nobody runs any more, it can
  have all that they were promised: at its admission that and what was free covered its worst case.
- It needs no page before the layer that it waits at, so all it holds is promised.
What somebody else holds, by `Engine.prefill`, is not waited for: the group ends with an error then, as one that waits.
"""

from __future__ import annotations

import bisect
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import CacheError, InvalidArgumentError, ModelError, PromptError, RequestCancelledError
from ..models import PreparedPrompt
from ..models.rows import Rows
from ..models.vision_language import LookAhead
from .kv_cache import KVCache
from .picture_cache import Seen
from .prefill import Prefill
from .prefix import Prefix
from .runner import Runner
from .running import picked
from .sampling import most_likely, token_logprobs
from .sequence import Sequence

_MANY = 16  # requests
_REMEMBERED = 8  # requests that the usual share of the worst case is a mean of, about


def _usual(s: Sequence, worst: int, share: float) -> int:
    """Pages that it is promised where its worst case is not there."""
    return math.ceil(share * worst) if s.may_leave else worst


class _Group:
    """Sequences of one policy that are prefilled together: first their vision, then layer by layer.

    prefixes: of each what is known of its beginning, as it was admitted with.
    share: of its worst case, what one with visual tokens is promised where not all of that is there.
    waits: for pages, before its next layer.
    errors: of those that fell out between the layers, by their place; cancelled ones too.
    """

    def __init__(self, runner: Runner, sequences: list[Sequence], prefixes: list[Prefix | None], share: float = 1.0):
        self._runner, self.sequences, self._prefixes, self._share = runner, sequences, prefixes, share
        self.worst: dict[Sequence, int] = {}  # pages
        self._tight = self.waits = False
        self.errors: dict[int, BaseException] = {}
        self._prepared: list[Seen] = []
        self._one_by_one = False
        self._ahead: LookAhead | None = None  # of those who are prepared next
        self._vision_s = 0.0  # that they have taken so far
        self._prefill: Prefill | None = None
        self._shrunk: Rows | None = None  # the claims are for these
        self.caches = [runner.cache(len(sequences), len(sequences))]

    @property
    def cache(self) -> KVCache:
        """What holds their rows; those before it are empty, unless somebody interrupted."""
        return self.caches[-1]

    def claim(self) -> None:
        """Their worst case, or their share; apart from the making, so that an interrupt finds what was taken."""
        for b, prefix in enumerate(self._prefixes):  # all of them, before a claim makes one leave that is not in use
            if prefix is not None:
                self.cache.lease(b, prefix.pages)
        for s, prefix in zip(self.sequences, self._prefixes, strict=True):
            self.worst[s] = s.worst_pages
            if prefix is not None:
                self.worst[s] = self._runner.worst_pages(s.rows, s.may_leave, s.policy, prefix)
        self._tight = self._share < 1 and sum(self.worst.values()) > self._runner.pool.claimable
        for b, s in enumerate(self.sequences):
            self.cache.claim(b, _usual(s, self.worst[s], self._share) if self._tight else self.worst[s])
            s.begin()

    @property
    def done(self) -> bool:
        """Whether all layers have run."""
        return self._prefill is not None and self._prefill.done

    def advance(self, row_layers: float, least: bool) -> float:
        """Run what comes next while it costs at most `row_layers`; `least`: one piece, whatever it costs.

        A piece is a block of the vision tower or a layer, or what is before and behind the tower. Returns the cost.
        """
        used = 0.0
        while not (self.done or self.empty):
            cost = self._piece(row_layers - used, least and not used)
            if cost is None:
                break
            used += cost
        return used

    def _piece(self, row_layers: float, least: bool) -> float | None:
        """Returns what it cost; None: that would be more than `row_layers`, and it need not be run."""
        if self._prefill is not None:
            prefill = self._prefill
            used = prefill.advance(row_layers, least, lambda: not self._tight or self._promised(prefill))
            self._shrink(prefill)
            return used or None
        done = len(self._prepared)
        if done == len(self.sequences):
            self._begin()
            return 0.0
        now = self.sequences[done : done + 1] if self._one_by_one else self.sequences[done:]
        started = time.perf_counter()
        try:
            cost, prepared = self._see(now, row_layers, least)
        except Exception as error:
            if len(now) == 1:
                self.lose(now[0], error)
            self._one_by_one, self._ahead = True, None
            return 0.0
        self._vision_s += time.perf_counter() - started
        self._enter(now, prepared)
        return cost

    def _see(self, now: list[Sequence], row_layers: float, least: bool) -> tuple[float | None, list[Seen]]:
        """Of these, a piece: its cost as in `_piece`, and with the last one their prompts at the decoder's entry.

        What is before the tower's blocks, and what is behind them, counts as a layer of the visual rows.
        """
        pictures, policy, prompts = self._runner.pictures, now[0].policy, [s.prompt for s in now]
        visual: float = sum(s.visual_tokens for s in now)
        if self._ahead is not None and not self._ahead.blocks.done:
            return self._ahead.blocks.advance(row_layers, least) or None, []
        if visual > row_layers and not least:
            return None, []
        in_slices = self._ahead is None and visual > 0 and row_layers < float("inf")
        if in_slices and pictures.unseen(prompts, policy):
            self._ahead = pictures.look_ahead(prompts, policy)
            if self._ahead is None and not least:
                return None, []  # it can only run as a whole, in a slice of its own
            if self._ahead is not None:
                return visual, []
            visual = max(visual, row_layers)
        return visual, pictures.prepare(prompts, policy, self._ahead)

    def _enter(self, now: list[Sequence], prepared: list[Seen]) -> None:
        """Those that are prepared are at the decoder's entry."""
        if not prepared:
            return
        seconds, self._vision_s, self._ahead = self._vision_s, 0.0, None
        for s, seen in zip(now, prepared, strict=True):
            s.saw_vision(seconds, seen.reused)
            self._prepared.append(seen)
            beyond = self._beyond(s, seen.prompt)
            if beyond is not None:
                self.lose(s, beyond)

    def _shrink(self, prefill: Prefill) -> None:
        """Claims fall to what is held at most once visual tokens have left: others need not wait for the last layer."""
        if prefill.rows is self._shrunk:
            return
        self._shrunk = prefill.rows
        for b, rows in enumerate(prefill.most_rows()):
            if b not in self.errors and self.cache.leases[b] is None:
                later = self.sequences[b].max_new_tokens - 1
                now = sum(self._runner.pool.pages(n + later) for n in rows)
                self.cache.claim(b, min(now, self.cache.claims[b]))  # which may count on a later exit already

    def _promised(self, prefill: Prefill) -> bool:
        """Whether claims cover the next layers, what follows once visual tokens have left, and the answers."""
        pool, cache = self._runner.pool, self.cache
        least = prefill.least_pages([s.max_new_tokens - 1 for s in self.sequences])
        needs = {b: min(n, self.worst[s]) for b, (s, n) in enumerate(zip(self.sequences, least, strict=True))}
        more = {b: n for b, n in needs.items() if b not in self.errors and n > cache.claims[b]}
        self.waits = sum(n - cache.claims[b] for b, n in more.items()) > pool.claimable
        if self.waits and prefill.awaits_decision:  # with which it may need less
            prefill.move_out()
            return self._promised(prefill)
        if not self.waits:
            for b, n in more.items():
                cache.claim(b, n)
        return not self.waits

    def _beyond(self, s: Sequence, prepared: PreparedPrompt) -> PromptError | None:
        """With several axes a position may be beyond the number of rows (slow videos)."""
        if prepared.rotations is None:
            return None
        last = int(prepared.positions[-1])
        if last + s.max_new_tokens < self._runner.max_len:
            return None
        given = f"the prompt ends at position {last} and the answer has {s.max_new_tokens} tokens"
        return PromptError(f"{given}; accepted: together below max_len {self._runner.max_len}")

    def _begin(self) -> None:
        cache, n = self.cache, len(self.sequences)
        if n < cache.slots:  # some were lost: a prefill takes no empty slots
            self.caches.append(self._runner.cache(n, 0))
            self.cache.join(cache)
        runner, policy, prompts = self._runner, self.sequences[0].policy, [seen.prompt for seen in self._prepared]
        keys = [
            (s.prompt.input_ids, seen.digest, prefix)
            for s, seen, prefix in zip(self.sequences, self._prepared, self._prefixes, strict=True)
        ]
        self._prefill = runner.prefill(self.cache, prompts, policy, keys=keys)
        self._shrunk = self._prefill.rows

    def lose(self, sequence: Sequence, error: BaseException) -> None:
        """The sequence falls out and frees what it held; its rows are computed to the end if they are under way."""
        place = self.sequences.index(sequence)
        sequence.fail(error)
        if self._prefill is not None:
            self._prefill.give_up(place)
            self.errors[place] = error
            return
        self.cache.select([b for b in range(self.cache.count) if b != place])
        del self.sequences[place], self._prefixes[place], self._prepared[place : place + 1]
        self._ahead = None  # which was for him too

    @property
    def empty(self) -> bool:
        """Whether nobody is left in it."""
        return len(self.errors) == len(self.sequences)

    def finish(self) -> tuple[list[Sequence], KVCache, Tensor]:
        """Those that can be decoded, their cache, and their logits. Claims shrink to what will be held."""
        assert self._prefill is not None
        pool, cache, done = self._runner.pool, self.cache, self._prefill.finish()
        left = [b for b in range(len(self.sequences)) if b not in self.errors]
        for b in left:
            s = self.sequences[b]
            s.prefilled(self._runner.model.decoder, cache, done, b, self._runner.unshared(s.policy))
            rows = cache.host_lens[:, b] + s.max_new_tokens - 1
            cache.claim(b, sum(map(pool.pages, rows.tolist())) - cache.shared(b))
        logits = done.logits
        if len(left) < len(self.sequences):
            cache.select(left)
            logits = picked(logits, left)
        return [self.sequences[b] for b in left], cache, logits

    def abandon(self) -> None:
        """After an interrupt: nobody waits for its rows, however long a traceback keeps it."""
        if self._prefill is not None:
            self._prefill.leave_graphs()

    def close(self) -> None:
        """Give everything back."""
        if self._prefill is not None:
            self._prefill.close()
        self.cache.close()


class Scheduler:
    """Waiting, beginning and running sequences of one engine. `submit` and `cancel` may be called from any thread."""

    def __init__(self, runner: Runner):
        self.runner = runner
        config = runner.config
        self._slots, self._max_stall = config.max_batch, config.max_stall
        self._queued = config.device.type == "cuda"  # a step is launched before the last one's text is made
        # Of `_waiting`. Reentrant: garbage that is collected here may be a stream nobody reads, which cancels.
        self._mutex = threading.RLock()
        self._waiting: list[Sequence] = []
        self._group: _Group | None = None
        self._running = runner.nobody(config.max_batch)
        self._sequences: list[Sequence] = []  # those in `_running`
        self._tokens: Tensor | None = None  # int64 [B], theirs, not fed yet
        self._shares: dict[type, float] = {}  # by policies: pages held behind the prefill, of the worst case, usually
        self._begun: list[Sequence] = []  # those that left `_waiting` and may not be done
        self._changing = False  # somebody is at work on all of these
        self._late: list[Sequence] = []  # cancelled meanwhile

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._group or self._sequences)

    @property
    def counts(self) -> dict[str, int]:
        """Requests that wait, that are prefilled, and that are decoded."""
        group = self._group  # the thread that runs steps may end it meanwhile
        prefilling = 0 if group is None else len(group.sequences)
        return dict(waiting=len(self._waiting), prefilling=prefilling, running=len(self._sequences))

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Queue them together. They must fit into the empty pool."""
        with self._mutex:
            for s in sequences:
                bisect.insort(self._waiting, s, key=lambda s: -s.priority)

    @torch.inference_mode()
    def cancel(self, sequence: Sequence) -> None:
        """End it and free what it holds, unless it is done."""
        with self._mutex:
            if sequence in self._waiting:
                self._give_up(sequence, RequestCancelledError("the request was cancelled"))
                return
        with self.runner.lock:
            if self._changing:  # a step of this thread: a policy cancels, or a stream is collected as garbage
                self._late.append(sequence)
                return
            with self._change():
                self._drop(sequence, RequestCancelledError("the request was cancelled"))

    def _give_up(self, waiting: Sequence, error: BaseException) -> None:
        """It ends before its turn; in this order, so that an interrupt leaves nobody who is neither done nor here."""
        waiting.fail(error)
        self._waiting.remove(waiting)

    def step(self) -> None:
        """One token for everybody, and at most `max_stall` row-layers of a prefill where somebody waits for it.

        What goes wrong ends the requests concerned, never the others. Whoever takes many steps is in torch's inference
        mode already: to enter it takes as long as half of what a step of one sequence does around its kernels.
        """
        if not torch.is_inference_mode_enabled():
            with torch.inference_mode():
                return self.step()
        with self.runner.lock, self._change():
            self._feed()
            self._prefill()
            self._choose()
            while self._late:
                self._drop(self._late.pop(), RequestCancelledError("the request was cancelled"))
            under_way = len(self._sequences) + (0 if self._group is None else len(self._group.sequences))
            if len(self._begun) > under_way:
                self._begun = [s for s in self._begun if not s.done]
            if not self.has_work:
                self.runner.check_integrity()

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Whoever changes what runs. One who is interrupted ends all requests that have begun."""
        if self._changing:
            raise InvalidArgumentError("a policy asks the engine that runs it for an answer; accepted: another engine")
        self._changing = True
        try:
            yield
        except BaseException as error:  # nothing here can be trusted to be whole
            self._abort(error)
            raise
        finally:
            self._changing = False

    def _feed(self) -> None:
        """The chosen tokens go through the layers."""
        tokens, self._tokens = self._tokens, None
        if tokens is None:
            return
        try:
            self._running.feed(tokens)
        except Exception as error:
            self._fail_running(error)

    @property
    def _slice(self) -> float:
        """Row-layers that those who run wait for in a step: on a CPU not all of `max_stall` where few are here.

        There a row costs about the same however many are decoded together, so short waits cost little. They decide how
        many that are: half as long a slice begins half as many answers a token. So where many wait, it is long.
        """
        if self._queued:
            return self._max_stall
        return self._max_stall * min(1.0, max(0.5, sum(self.counts.values()) / _MANY))

    def _prefill(self) -> None:
        """One group to its end, or where somebody waits for it, of one after the other what fits into a slice."""
        alone, used, least = not self._sequences, 0.0, True
        row_layers = float("inf") if alone else self._slice
        while least or not (alone or self._group):
            if self._group is None and self._waiting:
                self._admit()
            if self._group is None:
                return
            used += self._advance(self._group, row_layers - used, least)
            least = False

    def _advance(self, group: _Group, row_layers: float, least: bool) -> float:
        """The group joins those who run when it is done; what goes wrong ends it. Returns what it cost."""
        cost = 0.0
        try:
            cost = group.advance(row_layers, least)
            if group.waits and not self._sequences:
                raise self._held_elsewhere()
            if group.done and not group.empty:
                sequences, cache, logits = group.finish()
                self._learn(group.worst, sequences, cache.claims)
                self._running.join(cache, logits)
                self._sequences += sequences
        except Exception as error:
            for s in group.sequences:
                s.fail(error)
            group.close()
            self._group = None
            return cost
        if group.empty:
            group.close()
        if group.done or group.empty:
            self._group = None
        return cost

    def _admit(self) -> None:
        """Begin with the first that waits, if it fits, and others of its policy; nobody overtakes who lacks memory.

        Where somebody runs, a layer of the whole group keeps within `max_stall`, unless its first prompt does not.
        """
        with self._mutex:
            waiting = list(self._waiting)
        chosen = self._fitting(waiting)  # may hash pictures, for which nobody who submits has to wait
        with self._mutex:
            chosen = {s: prefix for s, prefix in chosen.items() if s in self._waiting}  # others are cancelled
            if not chosen and waiting and not self._sequences and waiting[0] in self._waiting:
                self._give_up(waiting[0], self._held_elsewhere())
            if chosen:
                self._begun += chosen  # first: an interrupt finds them here or there
                self._waiting = [s for s in self._waiting if s not in chosen]
                share = self._share(next(iter(chosen)))
                self._group = _Group(self.runner, list(chosen), list(chosen.values()), share)
                self._group.claim()

    def _held_elsewhere(self) -> CacheError:
        free = f"{self.runner.pool.claimable} of {self.runner.pool.n_pages} pages are free"
        return CacheError(f"{free}, held by batches of Engine.prefill; close them")

    def _share(self, s: Sequence) -> float:
        """Of its worst case, what one of its policy usually holds; all of it where prefixes are shared."""
        return self._shares.get(type(s.policy), 1.0) if self.runner.unshared(s.policy) is not None else 1.0

    def _learn(self, worst: dict[Sequence, int], sequences: list[Sequence], held: list[int]) -> None:
        """From sequences that have come through the layers: `held`, pages each will hold with its answer."""
        for s, pages in zip(sequences, held, strict=True):
            if s.may_leave:
                before = self._shares.get(type(s.policy), 1.0)
                self._shares[type(s.policy)] = before + (pages / worst[s] - before) / _REMEMBERED

    def _fitting(self, waiting: Iterable[Sequence]) -> dict[Sequence, Prefix | None]:
        """Those to begin with, and what is known of their beginnings."""
        chosen: dict[Sequence, Prefix | None] = {}
        room, pages = self._slots - len(self._sequences), self.runner.pool.claimable
        later = pages + sum(self._running.cache.claims)  # when nobody runs any more
        rows, policy = self._slice if self._sequences else float("inf"), None
        for s in waiting:
            if chosen and s.policy is not policy:
                continue
            if len(chosen) == room:
                break
            needed, prefix = self._needs(s, chosen.values(), pages)
            pages, later, policy = pages - _usual(s, needed, self._share(s)), later - needed, s.policy
            rows -= self.runner.worst_rows(s.prompt, s.policy, prefix)
            if min(pages, later) < 0 or (chosen and rows < 0):
                break
            chosen[s] = prefix
        return chosen

    def _needs(self, s: Sequence, counted: Collection[Prefix | None], free: int) -> tuple[int, Prefix | None]:
        """Pages that admit it, and the prefix to lease for that. What nobody reads yet, nor is `counted`, counts too.

        So one who is alone may fit without a prefix where it does not fit with it.
        """
        runner, prefix = self.runner, self.runner.known(s.prompt, s.policy)
        if prefix is None:
            return s.worst_pages, None
        shared = 0 if prefix.pages.users or prefix in counted else prefix.pages.count
        needed = runner.worst_pages(s.rows, s.may_leave, s.policy, prefix) + shared
        return (needed, prefix) if needed <= free else (s.worst_pages, None)

    def _choose(self) -> None:
        """A token for everybody; those that are finished leave."""
        came = self._sequences
        if not came:
            return
        tokens, read = self._sample(self._running.logits)
        for s, token in zip(came, read(), strict=True):
            if token < 0:
                s.fail(ModelError("the logits are not finite: the numbers of this dtype do not reach far enough"))
            elif not s.done:
                s.accept(token)
        stay = [i for i, s in enumerate(came) if s.finish_reason is None and not s.done]
        if len(stay) < len(came):
            self._running.select(stay)
            tokens = picked(tokens, stay)
        self._sequences = [came[i] for i in stay]
        self._tokens = tokens if stay else None
        if self._queued:  # the device is at work on the next token while these become text
            self._feed()
        for s in came:
            self._emit(s)

    def _sample(self, logits: Tensor) -> tuple[Tensor, Callable[[], list[int]]]:
        """f32 [B, vocab] -> int64 [B], and what reads them; see `most_likely`."""
        tokens, read = most_likely(logits)
        for i, s in enumerate(self._sequences):
            try:
                if not s.sampler.plain:
                    tokens[i] = s.sampler(logits[i].nan_to_num(), s.ids)
                if s.logprobs is not None:
                    s.newest_logprobs = token_logprobs(logits[i], tokens[i], s.logprobs)
            except Exception as error:
                s.fail(error)
        return tokens, read

    def _emit(self, sequence: Sequence) -> None:
        if sequence.done:
            return
        try:
            sequence.emit()
        except Exception as error:
            self._drop(sequence, error)

    def _drop(self, sequence: Sequence, error: BaseException) -> None:
        """A sequence that has begun ends without a result, unless it is done."""
        if sequence.done:
            return
        if self._group is not None and sequence in self._group.sequences:
            self._group.lose(sequence, error)
            if self._group.empty:
                self._group.close()
                self._group = None
            return
        sequence.fail(error)
        if sequence in self._sequences:
            stay = [i for i, s in enumerate(self._sequences) if s is not sequence]
            self._running.select(stay)
            self._sequences = [self._sequences[i] for i in stay]
            if self._tokens is not None:
                self._tokens = picked(self._tokens, stay) if stay else None

    def _fail_running(self, error: BaseException) -> None:
        for s in self._sequences:
            s.fail(error)
        self._running.close()
        self._running.logits = self._running.logits[:0]
        self._sequences, self._tokens = [], None

    def _abort(self, error: BaseException) -> None:
        """All that have begun end; their memory is counted anew, since theirs may be half given back."""
        group, begun, before = self._group, self._begun, self._running
        self._group, self._begun, self._sequences, self._tokens, self._late = None, [], [], None, []
        for s in begun:
            s.fail(error)
        with self._mutex:
            self._waiting = [s for s in self._waiting if s not in begun]
        self._running = self.runner.nobody(self._slots)
        if group is not None:
            group.abandon()
        self.runner.forget(before.cache, *([] if group is None else group.caches))
