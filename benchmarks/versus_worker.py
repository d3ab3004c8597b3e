"""One engine in a process of its own, for `benchmarks.versus`: a JSON request a line comes in, a JSON answer goes out.

Knows the engines; knows nothing of the comparison. Runs in the environment of the engine asked for, so it imports
nothing of this project but in the engine "dyvte".
"""

import ctypes
import json
import os
import sys
import time
from typing import ClassVar

from PIL import Image


class Dyvte:
    """This project; `option` is the dtype and the policy in its notation."""

    kept: ClassVar = {"picture_cache": 0, "prefix_cache": 0}

    def __init__(self, folder, option):
        from dyvte_engine import Engine
        from dyvte_engine.policies import parse

        dtype, policy = option.split(" ", 1)
        self.engine = Engine.from_pretrained(
            folder, dtype=dtype, device="cpu", policy=parse(policy), max_batch=1, **self.kept
        )

    def run(self, picture, text, new_tokens, ends):
        options = {} if ends else {"eos_token_id": []}
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
        self.pipeline = openvino_genai.VLMPipeline(folder, "CPU", **settings, **self.scheduling())

    def scheduling(self):
        return {}

    def run(self, picture, text, new_tokens, ends):
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, not ends, False
        pixels = self.openvino.Tensor(self.numpy.array(picture)[None])
        return self.pipeline.generate(text, images=[pixels], generation_config=config).texts[0]


class LlamaCpp:
    """llama.cpp and its libmtmd through llama-cpp-python's bindings; `option` is the type of the weights.

    Settings are its defaults (flash attention, which is faster than without; K/V in float16), but for K/V in float32
    where the weights are.
    """

    def __init__(self, folder, option):
        import jinja2
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self.llama, self.mtmd = llama_cpp, mtmd_cpp
        threads = int(os.environ["OMP_NUM_THREADS"])
        cache = llama_cpp.GGML_TYPE_F32 if option == "f32" else llama_cpp.GGML_TYPE_F16
        options = {"n_threads": threads, "n_threads_batch": threads, "type_k": cache, "type_v": cache}
        file = f"{folder}/model-{option}.gguf"
        self.model = llama_cpp.Llama(file, n_ctx=0, flash_attn=True, verbose=False, **options)
        self.context, self.vocab = self.model.ctx, llama_cpp.llama_model_get_vocab(self.model.model)
        options = mtmd_cpp.mtmd_context_params_default()
        options.use_gpu, options.print_timings, options.n_threads = False, False, threads
        options.media_marker = b"<image>"  # what the chat template writes for a picture
        file = f"{folder}/mmproj-{option}.gguf".encode()
        self.pictures = mtmd_cpp.mtmd_init_from_file(file, self.model.model, options)
        if self.pictures is None:
            raise RuntimeError(f"libmtmd does not load {file.decode()}")
        self.template = jinja2.Template(self.model.metadata["tokenizer.chat_template"])
        ends = {"bos_token": self.model.token_bos(), "eos_token": self.model.token_eos()}
        self.ends = {k: llama_cpp.llama_vocab_get_text(self.vocab, v).decode() for k, v in ends.items()}
        self.greedy = llama_cpp.llama_sampler_init_greedy()

    def run(self, picture, text, new_tokens, ends):
        llama, tokens = self.llama, []
        self.prefill(picture, text)
        while len(tokens) < new_tokens:
            tokens.append(llama.llama_sampler_sample(self.greedy, self.context, -1))
            if ends and llama.llama_vocab_is_eog(self.vocab, tokens[-1]):
                break
            if len(tokens) < new_tokens:
                last = (llama.llama_token * 1)(tokens[-1])
                self.done(llama.llama_decode(self.context, llama.llama_batch_get_one(last, 1)))
        return self.model.detokenize(tokens).decode(errors="replace")

    def prefill(self, picture, text):
        """The whole prompt into an empty cache."""
        mtmd, chunks, end = self.mtmd, self.chunks(picture, text), self.llama.llama_pos()
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), False)
        at = (0, 0, self.model.n_batch, True, ctypes.byref(end))
        self.done(mtmd.mtmd_helper_eval_chunks(self.pictures, self.context, chunks, *at))
        mtmd.mtmd_input_chunks_free(chunks)

    def chunks(self, picture, text):
        """The prompt cut at its picture."""
        mtmd, pixels = self.mtmd, picture.tobytes()
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt = self.template.render(messages=chat, add_generation_prompt=True, **self.ends).encode()
        chunks = mtmd.mtmd_input_chunks_init()
        bitmap = mtmd.mtmd_bitmap_init(*picture.size, (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels))
        words = ctypes.byref(mtmd.mtmd_input_text(prompt, len(prompt), False, True))
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        self.done(mtmd.mtmd_tokenize(self.pictures, chunks, words, bitmaps, 1))
        mtmd.mtmd_bitmap_free(bitmap)
        return chunks

    def done(self, status):
        if status:
            raise RuntimeError(f"llama.cpp answered {status}")


ENGINES = {"dyvte": Dyvte, "transformers": Transformers, "openvino": OpenVino, "llama.cpp": LlamaCpp}


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
