"""A batch: every sequence exits where its own answer allows it. A question without a picture has None for one."""

from dyvte_engine import EXAMPLES, NANO_HEADS, DynamicExit, Engine

QUESTIONS = {
    "What color is the rectangle?": EXAMPLES / "7_color.png",
    "What is the red shape?": EXAMPLES / "6_shape.png",
    "Is there a teal shape?": EXAMPLES / "2_count.png",
    "Is there a brown shape?": EXAMPLES / "5_presence.png",
}

engine = Engine.from_pretrained("nano", policy=DynamicExit.from_file(NANO_HEADS))
results = engine.generate(list(QUESTIONS), list(QUESTIONS.values()), max_new_tokens=8)
for question, result in zip(QUESTIONS, results):
    left = "stayed" if result.stats.exit_layer is None else f"left after layer {result.stats.exit_layer}"
    print(f"{question} {result.text.strip()} (the picture {left})")
