"""Where visual and text tokens are in a packed batch, and what remains of it when visual tokens leave.

A batch in prefill is one packed `[N, d]` tensor without padding. `Rows` goes with it: what it must know
on the host is kept as lists, so that dropping rows needs no device synchronisation beyond the decision itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ..kernels.attention import Lengths
from ..kernels.transfer import Values, to_device, to_device_together


def runs(visual: Tensor) -> list[int]:
    """bool [n], on the host -> lengths of the unbroken stretches of visual rows."""
    edges = torch.nn.functional.pad(visual.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return [end - start for start, end in zip(edges[::2], edges[1::2], strict=True)]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows present at one layer.

    Attributes:
        positions: int32 [N], the row's position in the prompt that entered layer 0, unless a policy renumbered.
        visual: bool [N], whether the row is a visual token.
        source: int64 [N], the row's number in the rows that entered layer 0.
        lengths: rows of each sequence.
        n_visual: visual rows of each sequence; n_entered: those that entered layer 0.
        n_tail: rows of T, the text after the last visual token (the whole prompt if there is none).
        text_ranges: int32 [B, 2], first row and end of each sequence's T.
        marks: `visual` on the host, as long as all that left is known there.
        rotations: f32 [N0, rot_dim] for the rows that entered layer 0 where positions have several axes, else None.
        additions: for the first layers what is added to the residual stream leaving them, [N0, d] each (deepstack).
    """

    positions: Tensor
    visual: Tensor
    source: Tensor
    lengths: Lengths
    n_visual: list[int]
    n_entered: list[int]
    n_tail: list[int]
    text_ranges: Tensor
    marks: Tensor | None = None
    rotations: Tensor | None = None
    additions: Sequence[Tensor] = ()

    @classmethod
    def from_sequences(
        cls,
        visual: Sequence[Tensor],
        positions: Sequence[Tensor],
        rotations: Tensor | None = None,
        additions: Sequence[Tensor] = (),
    ) -> Rows:
        """visual: bool [n_b] per sequence, on the host; positions: int32 [n_b], on the device.

        A prompt that ends in a picture keeps its last row as text: the next token is predicted from it.
        """
        device, host = positions[0].device, [len(v) for v in visual]
        bits = [v[:-1].numpy().tobytes() + b"\0" for v in visual]
        marks = torch.frombuffer(bytearray().join(bits), dtype=torch.bool)
        n_visual = [each.count(1) for each in bits]
        n_tail = [n - 1 - each.rfind(1) for n, each in zip(host, bits, strict=True)]
        numbers = torch.arange(len(marks), device="cpu")
        parts: list[Values] = [(numbers, torch.int64), *_ends(host, n_tail), (marks, torch.bool)]
        source, cu, text_ranges, on_device = to_device_together(parts, device)
        return cls(
            positions=(torch.cat(list(positions)) if len(positions) > 1 else positions[0].contiguous()).to(torch.int32),
            visual=on_device,
            source=source,
            lengths=Lengths(cu, host),
            n_visual=n_visual,
            n_entered=n_visual,
            n_tail=n_tail,
            text_ranges=text_ranges,
            marks=marks,
            rotations=rotations,
            additions=additions,
        )

    def rotation_table(self, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
        """A table of rotations and the rows' int32 [N] numbers in it; `cos_sin` is the decoder's, by position."""
        return (cos_sin, self.positions) if self.rotations is None else (self.rotations, self._entry_rows)

    @cached_property
    def _entry_rows(self) -> Tensor:
        """`source` as the kernels take it; made once for all layers that see these rows."""
        return self.source.to(torch.int32)

    @cached_property
    def visual_rows(self) -> Tensor:
        """int32 [sum(n_visual)], ascending row numbers of the visual tokens."""
        return torch.nonzero_static(self.visual, size=sum(self.n_visual))[:, 0].to(torch.int32)

    @cached_property
    def visual_cu(self) -> Tensor:
        """int32 [B+1], where each sequence's part of `visual_rows` begins."""
        return Lengths.of(self.n_visual, self.visual.device).cu

    @property
    def row_counts(self) -> Tensor:
        """int32 [B], rows of each sequence."""
        return self.lengths.counts

    @property
    def last_rows(self) -> Tensor:
        """int64 [B], the last row of each sequence."""
        return self.lengths.last

    @cached_property
    def next_positions(self) -> Tensor:
        """int32 [B], the position after each sequence's last row."""
        return self.positions[self.last_rows] + 1

    def renumbered(self, which: Sequence[bool]) -> Rows:
        """The same rows, those of the given sequences at positions 0, 1, 2, ..."""
        total, counts = sum(self.lengths.host), self.row_counts.long()
        first = torch.repeat_interleave(self.lengths.cu[:-1], counts, output_size=total)
        chosen = torch.repeat_interleave(to_device(which, first.device, torch.bool), counts, output_size=total)
        numbers = torch.arange(total, dtype=torch.int32, device=first.device) - first
        return replace(self, positions=torch.where(chosen, numbers, self.positions))

    def drop(self, decision: Sequence[Tensor | None]) -> tuple[Rows, Tensor] | None:
        """Apply a decision: per sequence None, or the ascending numbers (among its visual rows) of those that stay.

        Returns the smaller rows and the int64 row numbers that stay, or None when nothing leaves.
        """
        n_visual = [n if keep is None else len(keep) for keep, n in zip(decision, self.n_visual, strict=True)]
        if n_visual == self.n_visual:
            return None
        return self._fewer(decision, n_visual) if any(n_visual) else self.text_only

    @cached_property
    def text_only(self) -> tuple[Rows, Tensor]:
        """As `drop` of all visual rows: known before that is decided, so that it need not be made then."""
        return self._fewer([self.source[:0]] * len(self.n_visual), [0] * len(self.n_visual))

    def _fewer(self, decision: Sequence[Tensor | None], n_visual: list[int]) -> tuple[Rows, Tensor]:
        host = [n - old + new for n, old, new in zip(self.lengths.host, self.n_visual, n_visual, strict=True)]
        device = self.visual.device
        if self.marks is not None and all(keep is None or len(keep) == 0 for keep in decision):
            rows = self._text_left([keep is not None for keep in decision], self.marks)
            left = self.marks[rows]
            parts: list[Values] = [(rows, torch.int64), *_ends(host, self.n_tail), (left, torch.bool)]
            index, cu, text_ranges, visual = to_device_together(parts, device)
            marks: Tensor | None = left
        else:
            index, marks = self._staying(decision, n_visual, sum(host)), None
            cu, text_ranges = to_device_together(_ends(host, self.n_tail), device)
            visual = self.visual[index]
        fewer = replace(
            self,
            positions=self.positions[index],
            visual=visual,
            source=self.source[index],
            lengths=Lengths(cu, host),
            n_visual=n_visual,
            text_ranges=text_ranges,
            marks=marks,
        )
        return fewer, index

    def _text_left(self, leave: Sequence[bool], marks: Tensor) -> Tensor:
        """int64 on the host: the rows that stay where all visual ones of some sequences leave."""
        which, lengths = torch.tensor(leave, device="cpu"), torch.tensor(self.lengths.host, device="cpu")
        return (~(marks & torch.repeat_interleave(which, lengths))).nonzero()[:, 0]

    def _staying(self, decision: Sequence[Tensor | None], n_visual: Sequence[int], total: int) -> Tensor:
        """int64 [total] on the device: the rows that stay."""
        if not any(n_visual):
            return torch.nonzero_static(~self.visual, size=total)[:, 0]
        stay, start = torch.ones_like(self.visual), 0
        for keep, before, after in zip(decision, self.n_visual, n_visual, strict=True):
            if keep is not None and after < before:
                visual = self.visual_rows[start : start + before].long()
                # Not `stay[visual] = False`: that copies the number to the device, and waits.
                stay.index_fill_(0, visual, False)
                stay.index_fill_(0, visual[keep], True)
            start += before
        return torch.nonzero_static(stay, size=total)[:, 0]


def _ends(host: Sequence[int], n_tail: Sequence[int]) -> list[Values]:
    """For `to_device_together`: where sequences of so many rows begin and end, and where their T does."""
    ends = list(accumulate(host))
    ranges = [(end - tail, end) for end, tail in zip(ends, n_tail, strict=True)]
    return [([0, *ends], torch.int32), (ranges, torch.int32)]
