"""Writes docs/families.md from what the tests of this folder say: `python -m tests.families.table`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dyvte_engine.models.families import REFUSED

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
HEAD = """# Families

What runs on which `model_type` of transformers.

```sh
python -m tests.families.table
```

writes this page from the tests in `tests/families`, here with torch {torch} and transformers {transformers}.
Each cell is a random tiny model of the family against transformers' own code (its `generate`, and
its own layers under 4-D masks). The first two rows are of 20 random prompts with 0 to 3 pictures, the second row
of 16 for each layer. "refused" is a typed error with a reason; "-" has no test. The same tests pass
on the oldest supported releases (`make compat`).

Videos go through transformers' own processors too. Their video part needs torchvision: it is transformers' own where
that is installed, and a stand-in with the same tensors where it is not.

Nothing here says how an exit changes the answers of a real checkpoint: measure that (`dyvte-engine eval`, `sweep`).
"""


TAIL = """## Authors' own layouts

| checkpoint | how |
| --- | --- |
| LLaVA-1.5 (`mm_vision_tower` in config.json) | `dyvte-engine convert SOURCE TARGET`; `.bin` needs `--unpickle` |
| InternVL-Chat-ViT-6B-Vicuna (the same, with InternViT-6B as the tower) | the same |
| VILA-1.5 (`llm`, SigLIP in `vision_tower`, `mlp_downsample` in `mm_projector`) | `Engine.from_pretrained(FOLDER)` |
| EAGLE (`eagle_llama`: Eagle-X4, Eagle-X5), or a decoder alone (Llama, Mistral, Qwen2, Qwen3) | as described below |

The loaders are tested on synthetic checkpoints written in these layouts, not on published ones. Each refuses weights
that are missing or left over.

## Vision code outside of the engine

EAGLE's five towers stay in its own code, which was written for transformers 4.37. From its checkpoint the engine loads
the decoder (`model.layers`, `model.embed_tokens`, `model.norm`, `lm_head`) and leaves out `model.vision_tower`,
`model.mm_projector` and `model.image_newline`; any other weight is an error. `generate` is refused; `prefill` takes the
embeddings that EAGLE's `prepare_inputs_labels_for_multimodal` puts together, from a file if it runs in an environment
of its own, and the mask of its visual rows (1,024 for a picture of Eagle-X5):

```python
engine = Engine.from_pretrained("Eagle-X5-7B", FixedExit(16))
with engine.prefill(inputs_embeds, visual_mask) as running:  # [n, d], bool [n]
    tokens = [int(running.logits[0].argmax())]
    while tokens[-1] != 2 and len(tokens) < 128:
        tokens.append(int(running.step(tokens[-1:])[0].argmax()))
```
"""


class Recorder:
    """A pytest plugin: the outcome of every test that carries a feature and a family."""

    def __init__(self) -> None:
        self.places: dict[str, list[tuple[str, str, str]]] = {}
        self.cells: dict[tuple[str, str], str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            marks, call = list(item.iter_markers("feature")), getattr(item, "callspec", None)
            if call is not None:
                words = ["refused" if mark.kwargs.get("refused") else "yes" for mark in marks]
                where = call.params.get("family")
                self.places[item.nodeid] = [(where, m.args[0], word) for m, word in zip(marks, words, strict=True)]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.skipped or (report.when != "call" and report.passed):
            return
        for family, feature, word in self.places.get(report.nodeid, []):
            if not report.passed:
                self.cells[family, feature] = "**fails**"
            else:
                self.cells.setdefault((family, feature), word)

    def page(self) -> str:
        places = [place for item in self.places.values() for place in item]
        families = list(dict.fromkeys(family for family, _, _ in places))
        features = list(dict.fromkeys(feature for _, feature, _ in places))
        rows = [["feature", *families], ["---"] * (len(families) + 1)]
        rows += [[feature, *(self.cells.get((f, feature), "-") for f in families)] for feature in features]
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        refused = "\n".join(f"- `{name}`: {why}." for name, why in REFUSED.items())
        head = HEAD.format(torch=torch.__version__.split("+")[0], transformers=transformers.__version__)
        return f"{head}\n{table}\n\nRefused at loading, because\n\n{refused}\n\n{TAIL}"


def main() -> int:
    recorder = Recorder()
    status = pytest.main(["-q", "-p", "no:cacheprovider", str(Path(__file__).parent)], plugins=[recorder])
    PAGE.write_text(recorder.page())
    print(f"{PAGE} written")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
