"""One engine in a process of its own, for `benchmarks.versus`: a JSON request a line comes in, a JSON answer goes out.

Knows the engines; knows nothing of the comparison. Runs in the environment of the engine asked for, so it imports
nothing of this project but in the engine "dyvte".
"""

import json
import os
import sys
import time

from PIL import Image


class Dyvte:
    """This project; `option` is the dtype and the policy in its notation."""

    def __init__(self, folder, option):
        from dyvte_engine import Engine
        from dyvte_engine.policies import parse

        dtype, policy = option.split(" ", 1)
        self.engine = Engine.from_pretrained(folder, dtype=dtype, device="cpu", policy=parse(policy), max_batch=1)

    def run(self, picture, text, new_tokens, ends):
        options = {} if ends else {"eos_token_id": self.engine.model.shape.vocab_size}  # a token that never comes
        return self.engine.generate(text, picture, max_new_tokens=new_tokens, do_sample=False, **options).text


class Transformers:
    """`generate` with SDPA attention and its dynamic cache."""

    def __init__(self, folder, option):
        import torch
        import transformers

        cls = transformers.AutoModelForImageTextToText
        self.model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)

    def run(self, picture, text, new_tokens, ends):
        options = {} if ends else {"eos_token_id": self.model.config.get_text_config().vocab_size}
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = self.processor(text=[prompt], images=[picture], return_tensors="pt", add_special_tokens=False)
        out = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **options)
        return self.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class OpenVino:
    """OpenVINO GenAI's pipeline for pictures; `option` is the precision its kernels compute in."""

    def __init__(self, folder, option):
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.openvino, self.genai = numpy, openvino, openvino_genai
        settings = {} if option == "default" else {"INFERENCE_PRECISION_HINT": option}
        self.pipeline = openvino_genai.VLMPipeline(folder, "CPU", **settings)

    def run(self, picture, text, new_tokens, ends):
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, not ends, False
        pixels = self.openvino.Tensor(self.numpy.array(picture)[None])
        return self.pipeline.generate(text, images=[pixels], generation_config=config).texts[0]


ENGINES = {"dyvte": Dyvte, "transformers": Transformers, "openvino": OpenVino}


def main():
    name, folder, option = sys.argv[1:4]
    sys.path.pop(0)  # this file's folder: `kernels` there is not the package that transformers looks for
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes elsewhere
    os.dup2(2, 1)
    engine = ENGINES[name](folder, option)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        picture = Image.open(request["picture"]).convert("RGB")
        start = time.perf_counter()
        text = engine.run(picture, request["text"], request["new_tokens"], request["ends"])
        print(json.dumps({"seconds": time.perf_counter() - start, "text": text}), file=answers, flush=True)


if __name__ == "__main__":
    main()
