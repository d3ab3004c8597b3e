"""What a policy is: where it acts on visual tokens, and what stays of them there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import is_whole
from ..errors import InvalidArgumentError
from ..kernels import ops
from ..models.rows import Rows

if TYPE_CHECKING:
    from ..models.decoder import Decoder
    from ..models.vision import VisionTower
    from ..models.vision_run import VisionRun

# per sequence: None (all stay) or ascending int64 numbers of the visual rows that stay
Decision = Sequence[Tensor | None]


@dataclass(frozen=True, eq=False)
class Awaited:
    """A decision that has to be read; `likely` is what it comes to unless something read says otherwise.

    Rows for that, the same tensors, are made ready while the host waits.
    """

    read: Callable[[], Decision]
    likely: Decision

    def __call__(self) -> Decision:
        return self.read()


@dataclass(frozen=True, eq=False)
class LayerState:
    """What a policy may look at after layer `layer`.

    hidden [N, d] is the residual stream leaving the layer; q [N, Hq, D] and k [N, Hkv, D] are the layer's rotated
    queries and keys. `memory` lasts for one prefill: a policy keeps there, under itself, what it must remember.
    """

    layer: int
    decoder: Decoder
    hidden: Tensor
    q: Tensor
    k: Tensor
    rows: Rows
    memory: dict[VisualTokenPolicy, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return self.decoder.shape.num_layers

    @property
    def scale(self) -> float:
        """Multiplies q k^T."""
        return self.decoder.scale


def visual_attention(rows: Rows, q: Tensor, k: Tensor, scale: float, cu_q: Tensor | None = None) -> Sequence[Tensor]:
    """What each visual row gets of its sequence's attention, mean over heads and queries: f32 [n_visual] a sequence.

    q [B, Hq, D] of the last rows, or [Nq, Hq, D] with offsets `cu_q` int32 [B + 1]; k [N, Hkv, D]; both rotated.
    """
    cu = rows.lengths.cu
    one_each = torch.arange(len(cu), dtype=torch.int32, device=cu.device) if cu_q is None else cu_q
    return ops.token_score(q, k, one_each, cu, scale)[rows.visual_rows].split(rows.n_visual)


def highest(scores: Tensor, count: int) -> Tensor:
    """Ascending int64 numbers of the `count` highest scores; of all where there are fewer."""
    return scores.topk(min(count, len(scores))).indices.sort().values


class VisualTokenPolicy:
    """Base of all policies. Subclasses are dataclasses that act in one or more of three places.

    Between layers: `layers` and `decide`. Before the language model: `reduce`. In the vision tower: `in_tower`, with
    `acts_in_tower` true. Tokens taken before the language model leave no gap: positions are new and contiguous.
    """

    @property
    def acts_in_tower(self) -> bool:
        """Whether `in_tower` changes how many tokens the tower yields."""
        return False

    @property
    def acts_before_decoder(self) -> bool:
        """Whether `reduce` changes what enters layer 0."""
        return type(self).reduce is not VisualTokenPolicy.reduce

    @property
    def all_or_none(self) -> bool:
        """Whether a sequence's visual tokens leave all together, by no more of them than their mean and last row.

        Then what they have become is shared up to the layer where they leave, whatever that is (docs/again.md).
        """
        return False

    @property
    def tower_merges(self) -> tuple[int, ...]:
        """Rows that each block of the vision tower merges away, for the count of FLOPs."""
        return ()

    @property
    def tower_key(self) -> Hashable | None:
        """Names what `in_tower` does, if all of it is tensor work of fixed shapes inside the tower: it may be captured.

        None: it needs Python at every call.
        """
        return None

    @property
    def state(self) -> Hashable:
        """Changes when something in it does that its fields do not show, such as the values of its tensors."""
        return ()

    def bind(self, model: Any) -> VisualTokenPolicy:
        """This policy, ready to run on `model` (a `VisionLanguageModel`); a typed error if it cannot."""
        return self

    def in_tower(self, tower: VisionTower, run: VisionRun) -> None:
        """Arranges in `run` what happens in one call of the vision tower, on all pictures of a batch."""

    def reduce(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """What enters the language model for each picture: [V, d] each -> [V', d] each, in the order of the prompt."""
        return features

    def layers(self, num_layers: int) -> set[int]:
        """Layers after which `decide` is called (0-based; "after l" means layers 0..l see what leaves).

        -1 is before the first layer, where there are no queries and keys yet; positions stay those of the prompt.
        """
        return set()

    def decide(self, state: LayerState) -> Decision | Callable[[], Decision]:
        """Which visual tokens stay from here on, for each sequence.

        Where that must be read from a device: a function that gives it. It is called when the next layer's projections
        are queued, so that the device has work while the host waits. It may be `Awaited`, with what it likely gives.
        """
        raise NotImplementedError

    def most(self, visual: int, num_layers: int) -> list[int]:
        """How many of a sequence's visual tokens each layer sees at most, whatever they are: what it has to reserve.

        A subclass with `layers` or `decide` of its own needs its own: else all of them are reserved (`at_most`).
        """
        return [visual] * num_layers

    def renumbers(self, layer: int, num_layers: int) -> bool:
        """Whether a sequence that loses tokens after `layer` is numbered anew, 0, 1, 2, ...; else rows keep theirs."""
        return False


def at_most(policy: VisualTokenPolicy, visual: int, num_layers: int) -> list[int]:
    """What `policy.most` says, or `visual` everywhere where a subclass may act otherwise than the class that says it.

    Raises InvalidArgumentError for what are no such numbers.
    """
    says, *acts = (_home(type(policy), name) for name in ("most", "layers", "decide"))
    if not all(issubclass(says, cls) for cls in acts):
        return [visual] * num_layers
    most = policy.most(visual, num_layers)
    right = isinstance(most, (list, tuple)) and len(most) == num_layers
    if not (right and all(is_whole(n) and 0 <= n <= visual for n in most)):
        given = f"{type(policy).__name__}.most({visual}, {num_layers}) is {str(most)[:200]}"
        raise InvalidArgumentError(f"{given}; accepted: {num_layers} whole numbers, 0 to {visual}")
    return list(most)


def _home(cls: type, name: str) -> type:
    """The class that it has the method from."""
    return next(c for c in cls.__mro__ if name in vars(c))
