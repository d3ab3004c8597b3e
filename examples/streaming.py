"""Streaming: the tokens of several answers as they come, sampled with a seed."""

from dyvte_engine import EXAMPLES, Engine, FixedExit

engine = Engine.from_pretrained("nano", policy=FixedExit(8))
questions = ["What color is the rectangle? Answer in a sentence.", "Is there a teal shape? Use a full sentence."]
pictures = [EXAMPLES / "7_color.png", EXAMPLES / "2_count.png"]

for chunk in engine.stream(questions, pictures, do_sample=True, temperature=0.3, seed=1):
    print(f"answer {chunk.index}: {chunk.text!r}", flush=True)
    if chunk.result is not None:
        print(f"answer {chunk.index} ended ({chunk.result.finish_reason}): {chunk.result.text.strip()}")
