"""Asks an engine and measures what it did: all that the page shows, without the page."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..engine import Engine
from ..errors import DyvteError, ImageError, InvalidArgumentError, PromptError
from ..eval.sweep import Probe
from ..heads.rule import ExitRule
from ..inputs.images import load_image
from ..models import PreparedPrompt
from ..policies import Composed, DynamicExit, KeepAll, VisualTokenPolicy, compose
from ..policies.auto import policy_for
from ..policies.notation import files_in
from ..requests import GenerationResult, GenerationStats, Handle, Request
from .attention import AttentionWatch, RowsWatch, as_seen, grid_of

_MOST = 32  # policies of one comparison; pictures of a batch may be more
_TIMED_S, _ROUNDS = 0.5, 25  # prefills are timed for so long, for each policy, or in so many rounds


@dataclass(frozen=True)
class Settings:
    """How a question is asked. threshold: instead of the policy's own; temperature 0 is greedy."""

    policy: str = "auto"
    threshold: float | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `Engine.generate`."""
        sampling = {"temperature": self.temperature} if self.temperature else {}
        return dict(max_new_tokens=self.max_new_tokens, do_sample=bool(sampling), **sampling)


@dataclass(frozen=True, eq=False)
class Look:
    """What a few prefills of one prompt show.

    Attributes:
        text: rows of text in each layer; kept: for each layer which visual tokens of the prompt it has, bool
            [n_visual], None where the policy made others of them before the first layer.
        p_exit: what the head after each layer but the last says of the prompt while nothing has left by its word; the
            rule that makes an exit of it. None without heads.
        attention: f32 [L, n_visual], of the text to each visual token, if none left.
        grid: rows and columns of patches, None where the tokens form no grid; seen: the picture they are cut from.
    """

    text: tuple[int, ...]
    visual: tuple[int, ...]
    kept: tuple[np.ndarray, ...] | None
    p_exit: tuple[float, ...] | None
    rule: ExitRule | None
    attention: np.ndarray
    grid: tuple[int, int] | None
    seen: Image.Image


@dataclass(frozen=True, eq=False)
class Run:
    """One question under one policy, as far as it has come.

    Attributes:
        text: of the answer so far; result: when it is complete; error: instead of one.
        prefill_s: seconds of a prefill from the first layer to the last without any reuse, under the policy and under
            keep-all: the least of some alternating rounds, since other work on the machine only adds.
    """

    question: str
    picture: Image.Image = field(repr=False)
    name: str
    settings: Settings
    text: str = ""
    result: GenerationResult | None = None
    look: Look | None = None
    prefill_s: tuple[float, float] | None = None
    error: str | None = None

    @property
    def exit_layer(self) -> int | None:
        """As in `GenerationStats`, known as soon as there is a look."""
        if self.look is None or self.look.visual[-1]:
            return None
        return self.look.visual.index(0) - 1

    @property
    def stats(self) -> GenerationStats | None:
        return None if self.result is None else self.result.stats

    def record(self) -> dict[str, Any]:
        """All of it but the pixels, for JSON."""
        look = self.look
        return {
            "question": self.question,
            "picture": self.name,
            "size": list(self.picture.size),
            **asdict(self.settings),
            "answer": self.text,
            "error": self.error,
            "stats": None if self.stats is None else asdict(self.stats),
            "prefill_s": self.prefill_s and dict(zip(("policy", "keep_all"), self.prefill_s)),
            "p_exit": look and look.p_exit,
            "rule": look and look.rule and asdict(look.rule),
            "attention_to_picture": look and [round(float(x), 6) for x in look.attention.sum(1)],
            "attention_grid": look and look.grid,
            "attention": look and look.attention.round(7).tolist(),
        }


def read_picture(file: str | Path | None, name: str = "") -> Image.Image:
    """The picture of a question. Errors call it by `name`, not by where it is on this machine.

    Raises:
        ImageError: there is none, or `load_image` refuses it.
    """
    if file is None:
        raise ImageError("picture is missing; accepted: a picture, uploaded or one of the examples")
    return load_image(Path(file).read_bytes(), f"picture {name or Path(file).name}")


class Inspector:
    """Asks one engine. Safe to use from several threads.

    model: what it was loaded from, for "auto"; policy: the notation the page begins with, which may name a file.
    """

    def __init__(self, engine: Engine, model: str, policy: str = "auto"):
        self.engine, self.model, self.first_policy = engine, model, policy
        self._read = lru_cache(maxsize=16)(policy_for)  # heads of a large model are large
        self.policy(policy)

    def policy(self, notation: str, threshold: float | None = None) -> VisualTokenPolicy:
        """The policy, bound; with another threshold for its heads, if it has any.

        Raises:
            InvalidArgumentError: not understood, or names a file that this page was not started with.
            HeadsError, CalibrationError, ModelError: it cannot run here.
        """
        notation = notation.strip()
        if notation != self.first_policy and any(name != "auto" for name in files_in(notation)):
            given = f"policy {notation!r} names a file of the machine that runs the model"
            raise InvalidArgumentError(f"{given}; accepted here: auto, dynamic:auto, or policies without files")
        read = self._read(notation, self.model)
        return self.engine.bind(read if threshold is None else _with_threshold(read, threshold))

    def threshold(self, notation: str) -> float | None:
        """Of the policy's heads; None without any, or where each layer has its own."""
        heads = _heads(self.policy(notation))
        return heads.threshold if heads is not None and isinstance(heads.threshold, float) else None

    def ask(
        self, question: str, picture: Image.Image, settings: Settings, name: str = "", timed: bool = True
    ) -> Iterator[Run]:
        """The run after every token, then with its times. The look comes with the first token. Leaving cancels it.

        name: of the picture, for records. timed: measure the prefill, a second.

        Raises:
            DyvteError: before anything is computed.
        """
        policy = self.policy(settings.policy, settings.threshold)
        run = Run(question, picture, name, settings)
        handle = self._submit(run, policy)
        try:
            for chunk in handle:
                look = run.look or self.look(question, picture, policy)
                run = replace(run, text=run.text + chunk.text, result=chunk.result, look=look)
                yield run
        finally:
            handle.cancel()
        if timed:
            least, whole = self.prefill_seconds(question, picture, (policy, KeepAll()))
            yield replace(run, prefill_s=(least, whole))

    def compare(self, question: str, picture: Image.Image, settings: Settings, policies: Sequence[str]) -> list[Run]:
        """The same question under each policy, in their order; the requests run together, then prefills are timed.

        A policy that cannot run gets an error instead of an answer.
        """
        if not 1 <= len(policies) <= _MOST:
            raise InvalidArgumentError(f"{len(policies)} policies; accepted: 1 to {_MOST}, one in a line")
        runs = [Run(question, picture, "", replace(settings, policy=p, threshold=None)) for p in policies]
        done = self._all(runs)
        answered = [run for run in done if run.error is None]
        bound = [self.policy(run.settings.policy) for run in answered]
        *seconds, whole = self.prefill_seconds(question, picture, [*bound, KeepAll()])
        timed = {run: replace(run, prefill_s=(least, whole)) for run, least in zip(answered, seconds, strict=True)}
        return [timed.get(run, run) for run in done]

    def batch(
        self, question: str, sources: Sequence[tuple[str, str | Path]], settings: Settings
    ) -> Iterator[list[Run]]:
        """One question about each of the pictures (name, path), in order of the layer after which they left.

        Pictures that never left come after these, those that cannot be read last, with the reason. All runs so far come
        every time that some are done; they keep a small picture.
        """
        if not sources:
            raise ImageError("pictures are missing; accepted: at least one")
        done: list[Run] = []
        for start in range(0, len(sources), self.engine.config.max_batch):
            part = sources[start : start + self.engine.config.max_batch]
            runs = self._all([_read(question, name, source, settings) for name, source in part])
            for run in runs:
                run.picture.thumbnail((96, 96))
            done = sorted([*done, *runs], key=_by_exit)
            yield done

    def _all(self, runs: Sequence[Run]) -> list[Run]:
        """All answers. DyvteErrors become the run's."""
        handles: list[Handle | DyvteError] = []
        try:
            for run in runs:
                try:
                    if run.error:
                        raise ImageError(run.error)
                    handles.append(self._submit(run, self.policy(run.settings.policy, run.settings.threshold)))
                except DyvteError as e:
                    handles.append(e)
            return [_finished(run, handle) for run, handle in zip(runs, handles, strict=True)]
        finally:
            for handle in handles:
                if isinstance(handle, Handle):
                    handle.cancel()

    def _submit(self, run: Run, policy: VisualTokenPolicy) -> Handle:
        if not run.question.strip():
            raise PromptError("question is empty; accepted: some text")
        options = run.settings.options
        return self.engine.submit(
            Request(run.question, run.picture, policy=policy, seed=run.settings.seed, options=options)
        )

    def look(self, question: str, picture: Image.Image, policy: VisualTokenPolicy) -> Look:
        """Prefills the prompt under the policy, once more without what its heads decide, and once with all tokens."""
        engine, heads = self.engine, _heads(policy)
        watch, seen = RowsWatch(), AttentionWatch(engine.model.decoder.scale)
        self._prefill(self._prepare(question, picture, policy), policy, watch)
        whole = self._prepare(question, picture, KeepAll())
        self._prefill(whole, KeepAll(), seen)
        p_exit = None
        if heads is not None:
            probe = Probe((heads,))
            unheeded = _in_place_of_heads(policy, probe)
            self._prefill(self._prepare(question, picture, unheeded), unheeded)
            p_exit = tuple(float(said[0][0]) for said in probe.said)
        entered = whole[0].visual.numpy().nonzero()[0]
        made_others = policy.acts_in_tower or policy.acts_before_decoder
        return Look(
            tuple(watch.text),
            tuple(map(len, watch.visual)),
            None if made_others else tuple(np.isin(entered, left) for left in watch.visual),
            p_exit,
            None if heads is None else heads.rule,
            seen.table,
            grid_of(engine.model, picture, whole[0].pictures),
            as_seen(engine.model, picture),
        )

    def prefill_seconds(
        self, question: str, picture: Image.Image, policies: Sequence[VisualTokenPolicy]
    ) -> list[float]:
        """The least of alternating prefills under each policy, from the first layer on, nothing reused."""
        bound = [self.engine.bind(policy) for policy in policies]
        prompts = {p: self._prepare(question, picture, p) for p in bound}
        least = dict.fromkeys(prompts, float("inf"))
        began, rounds = time.perf_counter(), 0
        while not rounds or (rounds < _ROUNDS and time.perf_counter() - began < _TIMED_S * len(prompts)):
            for policy, prompt in prompts.items():
                started = time.perf_counter()
                self._prefill(prompt, policy)
                least[policy] = min(least[policy], time.perf_counter() - started)
            rounds += 1
        return [least[policy] for policy in bound]

    def _prepare(self, question: str, picture: Image.Image, policy: VisualTokenPolicy) -> list[PreparedPrompt]:
        return self.engine.prepare([question], [[picture]], policy=policy)

    def _prefill(self, prompts: list[PreparedPrompt], policy: VisualTokenPolicy, watch: Any = None) -> None:
        with self.engine.prefill_prepared(prompts, policy, watch):
            if self.engine.config.device.type == "cuda":
                torch.cuda.synchronize(self.engine.config.device)


def _read(question: str, name: str, source: str | Path, settings: Settings) -> Run:
    try:
        return Run(question, read_picture(source, name), name, settings)
    except ImageError as e:
        return Run(question, Image.new("RGB", (1, 1)), name, settings, error=str(e))


def _finished(run: Run, handle: Handle | DyvteError) -> Run:
    try:
        if isinstance(handle, DyvteError):
            raise handle
        result = handle.result()
    except DyvteError as e:
        return replace(run, error=str(e))
    return replace(run, text=result.text, result=result)


def _by_exit(run: Run) -> tuple[bool, float]:
    layer = None if run.stats is None else run.stats.exit_layer
    return run.stats is None, float("inf") if layer is None else layer


def _heads(policy: VisualTokenPolicy) -> DynamicExit | None:
    """The policy's part that asks heads; the first, if several do."""
    parts = policy.parts if isinstance(policy, Composed) else (policy,)
    return next((part for part in parts if isinstance(part, DynamicExit)), None)


def _in_place_of_heads(policy: VisualTokenPolicy, other: VisualTokenPolicy) -> VisualTokenPolicy:
    if isinstance(policy, Composed):
        return compose(*(_in_place_of_heads(part, other) for part in policy.parts))
    return other if isinstance(policy, DynamicExit) else policy


def _with_threshold(policy: VisualTokenPolicy, threshold: float) -> VisualTokenPolicy:
    if isinstance(policy, Composed):
        return compose(*(_with_threshold(part, threshold) for part in policy.parts))
    return replace(policy, threshold=threshold) if isinstance(policy, DynamicExit) else policy
