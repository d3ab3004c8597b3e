"""Inside transformers: its own model, processor and `generate`, with the exit in them."""

from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dyvte_engine import EXAMPLES, NANO, NANO_HEADS, DynamicExit, FixedExit, hf

model = LlavaForConditionalGeneration.from_pretrained(NANO)
processor = AutoProcessor.from_pretrained(NANO)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is the rectangle?"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=Image.open(EXAMPLES / "7_color.png").convert("RGB"), text=text, return_tensors="pt")


def answer(**options):
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


print("transformers:", answer())
print("for one call:", answer(custom_generate=hf.generate, policy=FixedExit(6)))
state = hf.enable(model, DynamicExit.from_file(NANO_HEADS))  # from here on every generate, pipelines included
print("for good:", answer(), f"(exit after layer {state.exit_layers[0]})")
