"""Generated pictures kept on disk as arrays, so that training never waits for drawing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from dyvte_engine.training.nano import scenes
from dyvte_engine.training.nano.questions import WEIGHTS, Question, ask_many

CHUNK = 500


def _draw(seed: int, split: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = [scenes.sample_scene(seed, split, index) for index in range(start, stop)]
    return np.stack([np.asarray(scenes.render(s)) for s in drawn]), np.stack([scenes.patch_labels(s) for s in drawn])


def load_pool(root: str | Path, seed: int, split: str, count: int, workers: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [count, 96, 96, 3] and patch labels uint8 [count, 144, len(LABELS)], drawn at the first call."""
    folder = Path(root) / f"pool-{split}-{seed}-{count}"
    paths = folder / "pictures.npy", folder / "labels.npy"
    if not folder.exists():
        partial_folder = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        partial_folder.mkdir(parents=True)
        starts = range(0, count, CHUNK)
        stops = [min(start + CHUNK, count) for start in starts]
        shape = (scenes.SIZE, scenes.SIZE, 3), (scenes.GRID**2, len(scenes.LABELS))
        arrays = [
            np.lib.format.open_memmap(partial_folder / path.name, "w+", np.uint8, (count, *tail))
            for path, tail in zip(paths, shape)
        ]
        with ProcessPoolExecutor(workers) as executor:
            for start, stop, parts in zip(starts, stops, executor.map(partial(_draw, seed, split), starts, stops)):
                for array, part in zip(arrays, parts):
                    array[start:stop] = part
        for array in arrays:
            array.flush()
        partial_folder.rename(folder)
    return np.load(paths[0], mmap_mode="r"), np.load(paths[1], mmap_mode="r")


def _ask(
    seed: int, split: str, number: int, weights: Sequence[float], shapes: tuple[int, int], start: int, stop: int
) -> list[list[Question]]:
    drawn = [scenes.sample_scene(seed, split, index) for index in range(start, stop)]
    asked_about = [scene.style != "shapes" or shapes[0] <= len(scene.shapes) <= shapes[1] for scene in drawn]
    return [ask_many(scene, number, weights) if asked else [] for scene, asked in zip(drawn, asked_about)]


def pool_questions(
    seed: int,
    split: str,
    count: int,
    number: int,
    weights: Sequence[float] = WEIGHTS,
    workers: int = 2,
    shapes: tuple[int, int] = (0, scenes.MAX_SHAPES),
) -> list[list[Question]]:
    """Up to `number` questions about each picture of the pool with the same seed, split and count.

    shapes: the least and the most shapes in a scene of style "shapes"; no questions are asked about others.
    """
    starts = range(0, count, CHUNK)
    stops = [min(start + CHUNK, count) for start in starts]
    ask = partial(_ask, seed, split, number, weights, shapes)
    with ProcessPoolExecutor(workers) as executor:
        return [asked for part in executor.map(ask, starts, stops) for asked in part]
