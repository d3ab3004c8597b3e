"""Shares with their confidence intervals."""

from __future__ import annotations

import math


def normalised(text: str) -> str:
    """Answers are compared in this form: one blank between words, no case."""
    return " ".join(text.split()).casefold()


Z95 = 1.959964


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of hits / count; (0, 1) when count is 0."""
    if not count:
        return 0.0, 1.0
    share, z2 = hits / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def share(hits: int, count: int) -> dict[str, float | int | list[float]]:
    """n, the share and its 95 % interval, rounded for a report."""
    low, high = wilson(hits, count)
    return {"n": count, "share": round(hits / max(count, 1), 4), "ci95": [round(low, 4), round(high, 4)]}
