"""Exit heads for your model: labels, training, use. Real ones need thousands of samples (docs/training.md), and
`pip install "dyvte-engine[train]"`.
"""

import json
import tempfile
from pathlib import Path

from dyvte_engine import EXAMPLES, DynamicExit, Engine
from dyvte_engine.training.head_data import Example
from dyvte_engine.training.label_store import label
from dyvte_engine.training.train_heads import HeadSettings, train_heads

entries = json.loads((EXAMPLES / "examples.json").read_text())
samples = [Example(EXAMPLES / e["file"], e["prompt"], name=e["file"]) for e in entries]
engine = Engine.from_pretrained("nano")

with tempfile.TemporaryDirectory() as folder:
    labels, heads = Path(folder, "labels"), Path(folder, "heads.safetensors")
    label(engine.model, samples, labels, mode="self")  # what an exit after each layer would change
    train_heads(labels, heads, HeadSettings.of("light", target_agreement=None, target_flops=0.7, epochs=5))
    policy = DynamicExit.from_file(heads)

print(f"threshold {policy.threshold:.3f}")
result = engine.generate(samples[0].prompt, samples[0].picture, policy=policy)
print(result.text.strip(), f"(exit after layer {result.stats.exit_layer})")
