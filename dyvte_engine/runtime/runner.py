"""What runs on the device: the decoder with its K/V pool, attention and graphs, for whoever brings prompts."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from PIL import Image

from ..config import EngineConfig
from ..errors import CacheError
from ..inputs.splice import reduce_pictures
from ..kernels.attention import CAPTURABLE, causal, choose_backend
from ..kernels.graphs import capture_cpu, capture_cuda
from ..kernels.transfer import DeviceLock
from ..models import PreparedPrompt, TokenizedPrompt, VisionLanguageModel
from ..models.fused import fused_layers
from ..models.rows import Rows
from ..models.tower_graphs import MOST
from ..policies import VisualTokenPolicy
from ..policies.base import at_most
from .decode import DecodeGraphs
from .known_rows import KnownRows
from .kv_cache import KVCache, PagePool, SharedPages
from .layer_graphs import BUCKETS, LayerGraphs
from .picture_cache import PictureCache, digest_of
from .prefill import Prefill, Watch
from .prefix import Prefix, PrefixStore, acts_after, key_of
from .running import Running


class Runner:
    """Prefills and decodes. `lock` is held by whoever uses the device."""

    def __init__(self, model: VisionLanguageModel, config: EngineConfig):
        self.model, self.config, self.lock = model, config, DeviceLock(config.device)
        self.max_len = model.decoder.max_len
        self._keys: weakref.WeakKeyDictionary[TokenizedPrompt, bytes | None] = weakref.WeakKeyDictionary()
        self.pictures = PictureCache(model, int(config.picture_cache), digests=int(config.prefix_cache) > 0)
        with self.lock:
            self._set_up(config)

    def _set_up(self, config: EngineConfig) -> None:
        model, shape = self.model, self.model.shape
        self.attn_backend, self._attention = choose_backend(
            config.attn_backend, config.device, config.dtype, shape.head_dim
        )
        self.pool = PagePool(shape, self._n_pages(), config.page_size, config.dtype, config.device)
        self.prefixes = PrefixStore(int(config.prefix_cache), self.pool)
        self._caches: weakref.WeakSet[KVCache] = weakref.WeakSet()
        self.fused = fused_layers(model.decoder, config.fused_decode)
        self.graphs = self.decode_graphs(config.max_batch)
        self.layer_graphs: LayerGraphs | None = None
        if config.device.type == "cuda" and config.graphs:
            if self.attn_backend in CAPTURABLE:
                # torch's flash is FlashAttention 2; of one sequence it has a newer one too, where the GPU can run that.
                alone = causal if self.attn_backend == "torch_flash" else None
                self.layer_graphs = LayerGraphs(model.decoder, self.pool, self._attention, alone=alone)
            model.capture_tower()

    def _n_pages(self) -> int:
        shape, config = self.model.shape, self.config
        one = shape.num_layers * -(-self.max_len // config.page_size)  # a sequence of max_len
        page_bytes = config.page_size * shape.kv_bytes_per_row * config.dtype.itemsize
        if config.kv_memory is None:
            return config.max_batch * one + int(config.prefix_cache) // page_bytes
        if config.kv_memory < one * page_bytes:
            needed = f"one sequence of max_len {self.max_len} needs {one * page_bytes}"
            raise CacheError(f"kv_memory is {config.kv_memory} bytes; {needed}")
        return config.kv_memory // page_bytes

    def decode_graphs(self, slots: int) -> DecodeGraphs | None:
        """Captured steps of up to so many sequences, if the engine is to have any."""
        if not self.config.graphs:
            return None
        on_cuda = self.config.device.type == "cuda"
        capture = capture_cuda if on_cuda else capture_cpu
        return DecodeGraphs(self.model.decoder, self.pool, slots, self.max_len, capture, on_cuda, self.fused)

    def cache(self, slots: int, count: int) -> KVCache:
        """Room for `slots` sequences, the first `count` of them in use."""
        cache = KVCache(self.pool, slots, self.max_len, count)
        self._caches.add(cache)
        return cache

    def prefill(
        self,
        cache: KVCache,
        prompts: Sequence[PreparedPrompt],
        policy: VisualTokenPolicy,
        watch: Watch | None = None,
        drop_early_kv: bool | None = None,
        keys: Sequence[tuple[Sequence[int], bytes, Prefix | None]] = (),
    ) -> Prefill:
        """The prompts at the decoder's entry, to be advanced, with a cache that has a slot for each.

        keys: of each its ids, its pictures' digest and its prefix, if that is found (`known`) and leased already; to
        share prefixes where nothing speaks against it.
        """
        decoder, prompts = self.model.decoder, reduce_pictures(policy, prompts)
        rows = _rows(prompts, decoder.cos_sin)
        embeds = prompts[0].inputs_embeds if len(prompts) == 1 else torch.cat([p.inputs_embeds for p in prompts])
        early = self.config.drop_early_kv if drop_early_kv is None else drop_early_kv
        known = None
        if keys and self.unshared(policy) is None:
            stop = acts_after(policy, self.pool.num_layers)
            prefixes = [
                found or self._prefix(policy, stop, prompt, len(prompt.visual) - tail, ids, pictures)
                for prompt, tail, (ids, pictures, found) in zip(prompts, rows.n_tail, keys, strict=True)
            ]
            if any(prefixes):
                known = KnownRows(decoder, cache, embeds, rows, policy, prefixes, self.prefixes, stop)
        return Prefill(decoder, self._attention, cache, embeds, rows, policy, early, watch, self.layer_graphs, known)

    def _prefix(
        self,
        policy: VisualTokenPolicy,
        stop: int | None,
        prompt: PreparedPrompt,
        end: int,
        ids: Sequence[int],
        pictures: bytes,
    ) -> Prefix | None:
        """Of the first rows up to `end`; None: there are none."""
        if policy.acts_in_tower or policy.acts_before_decoder:  # what it made of the pictures says it all
            ids, pictures = (), _digest(prompt, end)
        return self.prefixes.find(key_of(ids[:end], pictures), prompt.visual[:end], stop) if end else None

    def known(self, prompt: TokenizedPrompt, policy: VisualTokenPolicy) -> Prefix | None:
        """The prefix of a prompt before the tower has seen it; None: there is none yet, or its key is not known yet."""
        if self.unshared(policy) is not None or policy.acts_in_tower or policy.acts_before_decoder:
            return None
        if prompt not in self._keys:  # who waits is looked at in every step
            self._keys[prompt] = self._key(prompt)
        key = self._keys[prompt]
        return None if key is None else self.prefixes.get(key, acts_after(policy, self.pool.num_layers))

    def _key(self, prompt: TokenizedPrompt) -> bytes | None:
        """What its prefix is known by; None: it has no visual token."""
        visual = self.model.visual(torch.tensor(prompt.input_ids, device="cpu"))[:-1].nonzero()
        if len(visual) == 0:
            return None
        return key_of(prompt.input_ids[: int(visual[-1]) + 1], self.pictures.digest(prompt))

    def worst_pages(self, rows: int, visual: int, policy: VisualTokenPolicy, prefix: Prefix | None) -> int:
        """Pages of its own that a sequence of so many rows needs at most, behind this prefix.

        visual: of these rows, those that may leave: not the last of a prompt that ends in a picture. Raises as
        `at_most`.
        """
        layers = self.pool.num_layers
        alone = sum(self.pool.pages(rows - visual + n) for n in at_most(policy, visual, layers))
        return alone if prefix is None else min(alone, prefix.own_pages(rows, acts_after(policy, layers)))

    def worst_rows(self, prompt: TokenizedPrompt, policy: VisualTokenPolicy, prefix: Prefix | None) -> int:
        """Rows of a prompt that a layer computes at most, behind this prefix."""
        rows = len(prompt.input_ids)
        return rows if prefix is None else prefix.own_rows(rows, acts_after(policy, self.pool.num_layers))

    def unshared(self, policy: VisualTokenPolicy) -> str | None:
        """Why prefixes are not shared under this policy; None where they are."""
        if self.prefixes.budget == 0:
            return "off"
        if self.config.drop_early_kv:
            return "drop_early_kv"
        return "policy" if acts_after(policy, self.pool.num_layers) == -1 else None

    @torch.inference_mode()
    def run(
        self,
        prompts: Sequence[PreparedPrompt],
        policy: VisualTokenPolicy,
        watch: Watch | None = None,
        drop_early_kv: bool | None = None,
    ) -> Running:
        """A whole prefill at once. `drop_early_kv`: the engine's option, unless it is given."""
        with self.lock:
            cache = self.cache(len(prompts), len(prompts))
            try:
                with closing(self.prefill(cache, prompts, policy, watch, drop_early_kv)) as prefill:
                    self._claim_worst(cache, prefill.rows, policy)
                    prefill.advance()
                    done = prefill.finish()
                for b in range(len(prompts)):
                    cache.claim(b, cache.held(b))  # fewer than at its peak, where early K/V was dropped
                return Running(self.model.decoder, cache, done, self.graphs, self.lock, self.fused, self.forget)
            except Exception:
                cache.close()
                raise
            except BaseException:  # an interrupt, in the midst of anything
                self.forget(cache)
                raise

    def _claim_worst(self, cache: KVCache, rows: Rows, policy: VisualTokenPolicy) -> None:
        """As a request's, so that no layer has to look for pages; unless that would make prefixes leave."""
        each = zip(rows.lengths.host, rows.n_visual, strict=True)
        worst = [self.worst_pages(n, visual, policy, None) for n, visual in each]
        if sum(worst) <= self.pool.claimable - self.pool.idle:
            for b, pages in enumerate(worst):
                cache.claim(b, pages)

    def forget(self, *caches: KVCache) -> None:
        """What these hold is free, even if they were left half changed; they are empty from here on."""
        for cache in caches:
            cache.forget()
        self.prefixes.forget(*self.prefixes.busy)
        self.prefixes.busy.clear()
        read = self._read()
        for pages in {*self.prefixes.pages, *read}:
            pages.users = read[pages]  # an interrupt may have come between a count and what it counts
        held, claims, idle = self._held()
        self.pool.recount(held, claims, idle)

    def _read(self) -> Counter[SharedPages]:
        """How many sequences read each of the shared pages."""
        return Counter(lease for cache in list(self._caches) for lease in cache.leases if lease is not None)

    def _held(self) -> tuple[list[int], int, int]:
        """By caches and prefixes: pages, each as often as it is held, how many are claimed, and how many are idle."""
        caches, read = list(self._caches), self._read()
        shared = {*self.prefixes.pages, *read}
        held = [page for cache in caches for page in cache.pages_held()]
        held += [page for pages in shared for numbers in pages.numbers for page in numbers]
        claims = sum(sum(cache.claims) for cache in caches) + sum(pages.count for pages in shared if read[pages])
        return held, claims, sum(pages.count for pages in shared if not read[pages])

    def nobody(self, slots: int) -> Running:
        """A batch that prefilled sequences can join: so many slots, all empty."""
        cache = self.cache(slots, 0)
        return Running(self.model.decoder, cache, None, self.graphs, self.lock, self.fused, self.forget)

    def check_integrity(self) -> None:
        """Every page is free, or held once by a sequence or by what several share, and all claims add up.

        Raises:
            CacheError: they do not, which is a bug here.
        """
        held, claims, idle = self._held()
        found = len(held), len(set(held)), claims, idle
        counted = self.pool.allocator.used_count, self.pool.allocator.used_count, self.pool.claimed, self.pool.idle
        if found != counted:
            raise CacheError(
                "the K/V pool does not add up: pages held, different ones, claimed and idle are "
                f"{found}; the pool counts {counted}"
            )

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[int, int], Any] = lambda done, total: None) -> None:
        """Capture every graph that a request may ask for; from here on none is captured any more.

        Those of a prefill's layers are of one sequence: a prompt that comes alone needs them most. progress: called
        with the number of captures that are done, and of all.
        """
        with self.lock:
            if self.model.tower_graphs is not None:
                self.model.tower_graphs.sealed = False  # by another engine of this model, for fewer pictures
            jobs = list(self._captures())
            for done, job in enumerate(jobs):
                job()
                progress(done + 1, len(jobs))
            for graphs in (self.graphs, self.layer_graphs, self.model.tower_graphs):
                if graphs is not None:
                    graphs.sealed = True

    def _captures(self) -> Iterator[Callable[[], Any]]:
        if self.graphs is not None:
            yield from (partial(self.graphs.capture, key) for key in self.graphs.buckets())
        if self.layer_graphs is not None:
            yield from (partial(self.layer_graphs.warm_up, 1, bucket) for bucket in BUCKETS)
        if self.model.tower_graphs is not None and self.model.sees_pictures:
            black = self._black()
            yield from (partial(self.model.prepare, black * n) for n in range(1, min(MOST, self.config.max_batch) + 1))

    def _black(self) -> list[TokenizedPrompt]:
        """A prompt with a picture and nothing else."""
        return self.model.tokenize([self.model.processor.image_token], [[Image.new("RGB", (64, 64))]])

    def capture_tower(self, policy: VisualTokenPolicy) -> None:
        """After `warm_up`: the tower with a policy that acts in it, for one picture."""
        graphs = self.model.tower_graphs
        if graphs is None or not graphs.sealed or not policy.acts_in_tower or not self.model.sees_pictures:
            return
        if policy.tower_key is None or graphs.knows(policy.tower_key):
            return
        with self.lock:
            graphs.sealed = False
            try:
                self.model.prepare(self._black(), policy)
            finally:
                graphs.sealed = True


def _rows(prompts: Sequence[PreparedPrompt], cos_sin: torch.Tensor) -> Rows:
    """The rows of all prompts, one after the other. `cos_sin` serves those whose positions have one axis."""
    several_axes, rotations = any(p.rotations is not None for p in prompts), None
    if several_axes:
        rotations = torch.cat([cos_sin[p.positions.long()] if p.rotations is None else p.rotations for p in prompts])
    additions = [
        torch.cat([p.additions[k] if p.additions else torch.zeros_like(p.inputs_embeds) for p in prompts])
        for k in range(max(len(p.additions) for p in prompts))
    ]
    return Rows.from_sequences([p.visual for p in prompts], [p.positions for p in prompts], rotations, additions)


def _digest(prompt: PreparedPrompt, end: int) -> bytes:
    """Of the first rows as they enter the decoder."""
    entering = dict(rows=prompt.inputs_embeds, visual=prompt.visual, positions=prompt.positions)
    entering |= {} if prompt.rotations is None else {"rotations": prompt.rotations}
    return digest_of({name: tensor[:end].cpu() for name, tensor in entering.items()})
