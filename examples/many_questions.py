"""Many questions about one picture, as one batch: what the learned exit saves."""

from dyvte_engine import EXAMPLES, NANO_HEADS, Engine

COLORS = ("teal", "red", "brown", "yellow", "gray", "blue", "green")
questions = [f"Is there a {color} shape?" for color in COLORS]
pictures = [EXAMPLES / "5_presence.png"] * len(questions)

engine = Engine.from_pretrained("nano")
for policy in ("keep-all", f"dynamic:{NANO_HEADS}"):
    results = engine.generate(questions, pictures, policy=policy, max_new_tokens=4)
    kv = sum(r.stats.kv_bytes for r in results) / 2**20
    flops = sum(r.stats.prefill_tflops for r in results) * 1e3
    print(f"{policy.split(':')[0]}: {kv:.1f} MiB of K/V, {flops:.0f} GFLOP of prefill")
    for color, result in zip(COLORS, results):
        print(f"  {color}: {result.text.strip()} (exit after layer {result.stats.exit_layer})")
