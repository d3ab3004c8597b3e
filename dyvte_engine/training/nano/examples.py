"""Writes the example pictures that ship with nano: `python -m dyvte_engine.training.nano.examples`.

All are held out: scenes of the held-out split, and pictures of easy-VQA's test half (MIT licence).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from dyvte_engine.training.nano.easy import load_easy_vqa
from dyvte_engine.training.nano.questions import IN_A_SENTENCE, Question, ask_many
from dyvte_engine.training.nano.scenes import render, sample_scene

FIRST_SCENE = 500_000  # beyond the scenes that evaluate.py measures


def _scene_example(seed: int, kind: str, style: str, taken: set[int]) -> tuple[Image.Image, Question, str]:
    """The first unused held-out scene with a question of this kind that is answered in a sentence."""
    for index in range(FIRST_SCENE, FIRST_SCENE + 1000):
        scene = sample_scene(seed, "heldout", index, style)
        if index in taken or (style == "shapes" and len(scene.shapes) < 3):
            continue
        for question in ask_many(scene, 12):
            if question.kind == kind and question.text.endswith(IN_A_SENTENCE):
                taken.add(index)
                return render(scene), question, f"generated, seed {seed}, heldout {index}"
    raise LookupError(f"no held-out scene with a {kind} question")


def write_examples(folder: Path, seed: int) -> None:
    """Eight PNG files and `examples.json`, a list of {file, prompt, reference, source}."""
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[int] = set()
    wanted = [("spatial", "shapes"), ("count", "shapes"), ("word", "word"), ("color", "shapes"), ("presence", "shapes")]
    found = [_scene_example(seed, kind, style, taken) for kind, style in wanted]
    paths, asked = load_easy_vqa("test")
    for picture, kind in ((0, "shape"), (1, "color"), (2, "presence")):
        question = next(q for q in asked[picture] if q.kind == kind)
        image = Image.open(paths[picture]).convert("RGB")
        found.append((image, question, f"easy-VQA (MIT), test image {Path(paths[picture]).name}"))
    entries = []
    for number, (image, question, source) in enumerate(found, 1):
        name = f"{number}_{question.kind}.png"
        image.save(folder / name, optimize=True)
        entries.append({"file": name, "prompt": question.text, "reference": question.answer, "source": source})
    (folder / "examples.json").write_text(json.dumps(entries, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("dyvte_engine/assets/examples"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_examples(args.out, args.seed)


if __name__ == "__main__":
    main()
