"""The engines of `benchmarks.versus_worker` with their prefix caches on, for `benchmarks.again`; as there otherwise."""

import ctypes
from typing import ClassVar

import versus_worker
from versus_worker import Dyvte, LlamaCpp, OpenVino


class DyvteAgain(Dyvte):
    """With its defaults, which keep pictures and prefixes."""

    kept: ClassVar = {}


class OpenVinoAgain(OpenVino):
    """With the scheduler that shares blocks of equal beginnings."""

    def scheduling(self):
        scheduler = self.genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        return {"scheduler_config": scheduler}


class LlamaCppAgain(LlamaCpp):
    """The cache keeps what comes up to the picture, as llama.cpp's server does where a prompt begins alike."""

    known, rows = None, 0

    def prefill(self, picture, text):
        mtmd, pixels = self.mtmd, picture.tobytes()
        chunks = self.chunks(picture, text)
        memory, parts = self.llama.llama_get_memory(self.context), mtmd.mtmd_input_chunks_size(chunks)
        last = max(
            i for i in range(parts) if mtmd.mtmd_input_chunk_get_type(mtmd.mtmd_input_chunks_get(chunks, i)) == 1
        )
        first = last + 1 if self.known == pixels else 0  # the template writes the same before every picture
        self.llama.llama_memory_seq_rm(memory, 0, self.rows if first else 0, -1)
        at = self.llama.llama_pos(self.rows if first else 0)
        for i in range(first, parts):
            chunk, end = mtmd.mtmd_input_chunks_get(chunks, i), self.llama.llama_pos()
            rest = (0, self.model.n_batch, i == parts - 1, ctypes.byref(end))
            self.done(mtmd.mtmd_helper_eval_chunk_single(self.pictures, self.context, chunk, at, *rest))
            at = end
            if i == last:
                self.known, self.rows = pixels, end.value
        mtmd.mtmd_input_chunks_free(chunks)


versus_worker.ENGINES = {"dyvte": DyvteAgain, "openvino": OpenVinoAgain, "llama.cpp": LlamaCppAgain}

if __name__ == "__main__":
    versus_worker.main()
