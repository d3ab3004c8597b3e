"""The first answer: a question about a picture, and what the visual-token exit saved."""

from dyvte_engine import EXAMPLES, NANO_HEADS, DynamicExit, Engine

engine = Engine.from_pretrained("nano", policy=DynamicExit.from_file(NANO_HEADS))
result = engine.generate("What color is the rectangle?", EXAMPLES / "7_color.png")

stats = result.stats
print(result.text)
print(f"{stats.visual_tokens} visual tokens left after layer {stats.exit_layer} of {len(stats.tokens_per_layer)}")
print(f"K/V memory {stats.kv_bytes // 1024} KiB instead of {stats.kv_bytes_keep_all // 1024}")
print("tokens in each layer:", *stats.tokens_per_layer)
