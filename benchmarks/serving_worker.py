"""One engine in a process of its own, for `benchmarks.serving`: a JSON run a line comes in, a JSON answer goes out.

A run is requests and the clients that send them; the answer says when each token came. Runs in the environment of the
engine asked for, so it imports nothing of this project but in the engine "dyvte".
"""

import asyncio
import atexit
import base64
import io
import json
import os
import queue
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

GATHERED = 0.003  # seconds that a batch waits for others after its first request


@dataclass(eq=False)
class Job:
    """A request: its text, its picture or None, the length of its answer; `at` is when it is sent, in an open loop.

    asked, tokens: clock times, of the request and of each token. said: the tokens, ids or text. more: what the engine
    says about it.
    """

    text: str
    picture: Any
    new_tokens: int
    at: float = 0.0
    asked: float = 0.0
    tokens: list = field(default_factory=list)
    said: list = field(default_factory=list)
    more: dict = field(default_factory=dict)

    def token(self, said):
        self.tokens.append(time.perf_counter())
        self.said.append(said)


async def offer(answer, jobs, clients=None):
    """Have `answer(job)` called for every job. Returns the clock's time at the start.

    clients: so many send one job after the other, each when its last is answered; None: a job is sent when its time
    has come, whatever becomes of the others.
    """
    start, waiting = time.perf_counter(), iter(jobs)

    async def client():
        for job in waiting:
            if clients is None:
                await asyncio.sleep(start + job.at - time.perf_counter())
            job.asked = time.perf_counter() if clients is not None else start + job.at
            await answer(job)

    await asyncio.gather(*(client() for _ in range(clients or len(jobs))))
    return start


def chat(job):
    picture = [{"type": "image"}] if job.picture is not None else []
    return [{"role": "user", "content": [*picture, {"type": "text", "text": job.text}]}]


class Dyvte:
    """This project. A run names its policy, and may limit the K/V to `kv_memory` bytes or ask for static batches."""

    def __init__(self, folder, options):
        import dyvte_engine

        self.request, self.options = dyvte_engine.Request, {"do_sample": False, "eos_token_id": []}
        make = dyvte_engine.Engine.from_config if options["random"] else dyvte_engine.Engine.from_pretrained
        settings = {key: options[key] for key in ("device", "dtype", "max_len")}
        settings |= dict(picture_cache=0, prefix_cache=0)  # rounds repeat their pictures
        self.engine = make(folder, max_batch=options["slots"], **settings)
        self.batches, self.policies = Lists(self.engine, options["slots"]), {}
        self.taken = self.engine.runner.cache(1, 1)  # what a limit leaves of the pool

    def begin(self, run):
        pool, limit, config = self.engine.pool, run.get("kv_memory"), self.engine.config
        self.taken.claim(0, 0 if limit is None else max(0, pool.n_pages - limit // pool.page_bytes))
        self.engine._scheduler._max_stall = run.get("max_stall") or config.max_stall
        self.static, self.held, self.policy = run.get("static", False), [], self.bound(run["policy"])

    def bound(self, notation):
        """The policy, bound; "forced:N" in it is the paper's exit heads with weights that say to leave after N."""
        if notation not in self.policies:
            before, plus, last = notation.rpartition("+")
            policy = notation
            if plus:
                from dyvte_engine.policies import compose, parse

                policy = compose(parse(before), self.bound(last))
            elif notation.startswith("forced:"):
                from benchmarks.workload import forced_exit

                policy = forced_exit(self.engine, int(notation.removeprefix("forced:")))
            self.policies[notation] = self.engine.bind(policy)
        return self.policies[notation]

    async def answer(self, job):
        if self.static:
            return await self.batches.answer(job)
        asked = {**self.options, "max_new_tokens": job.new_tokens}
        request = self.request(job.text, job.picture, policy=self.policy, options=asked)
        handle = await asyncio.to_thread(self.engine.submit, request)
        async for chunk in handle:
            job.token(chunk.text)
            self.held.append((job.tokens[-1], self.engine.pool.bytes_held))
            if chunk.result is not None:
                job.more = {"queued": chunk.result.stats.queued_s}

    def text(self, job):
        return "".join(job.said)

    def about(self, start):
        return {} if self.static else {"held": [(at - start, held) for at, held in self.held]}


class Batches:
    """Engines that answer a batch as a whole, whose longest answer it lasts; meanwhile others wait."""

    def __init__(self, slots):
        self.slots, self.inbox = slots, queue.SimpleQueue()
        threading.Thread(target=self.serve, daemon=True).start()

    def begin(self, run):
        pass

    def about(self, start):
        return {}

    async def answer(self, job):
        """An answer is there with its own last token, though its batch goes on."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        self.inbox.put((job, lambda: loop.call_soon_threadsafe(done.set)))
        await done.wait()

    def serve(self):
        while True:
            waiting = [self.inbox.get()]
            time.sleep(GATHERED)
            while len(waiting) < self.slots and not self.inbox.empty():
                waiting.append(self.inbox.get())
            self.batch([job for job, _ in waiting], [tell for _, tell in waiting])

    def step(self, jobs, tells, said):
        """A token of each has come."""
        for job, tell, token in zip(jobs, tells, said):
            if len(job.tokens) < job.new_tokens:
                job.token(token)
                if len(job.tokens) == job.new_tokens:
                    tell()


class Lists(Batches):
    """This project's `stream` of a list of prompts."""

    def __init__(self, engine, slots):
        self.engine = engine
        super().__init__(slots)

    def batch(self, jobs, tells):
        settings = {"max_new_tokens": max(job.new_tokens for job in jobs), "do_sample": False, "eos_token_id": []}
        for chunk in self.engine.stream([job.text for job in jobs], [job.picture for job in jobs], **settings):
            self.step(jobs[chunk.index :][:1], tells[chunk.index :][:1], [chunk.text])

    text = Dyvte.text


class Release(Lists):
    """This project before it had requests."""

    def __init__(self, folder, options):
        from dyvte_engine import Engine
        from dyvte_engine.policies import parse

        settings = {key: options[key] for key in ("dtype", "max_len")}
        policy = parse(options["policy"])
        engine = Engine.from_pretrained(folder, device="cpu", policy=policy, max_batch=options["slots"], **settings)
        super().__init__(engine, options["slots"])


class Transformers(Batches):
    """`generate` with SDPA attention, left padding and its dynamic cache."""

    def __init__(self, folder, options):
        import torch
        import transformers

        device, dtype = torch.device(options["device"]), getattr(torch, options["dtype"])
        if options["random"]:
            from dyvte_engine.models.presets import preset
            from dyvte_engine.models.random_model import byte_processor, random_model

            config = preset(folder)
            self.model, self.processor = random_model(config, 0, dtype, device), byte_processor(config)
            self.model.set_attn_implementation("sdpa")
        else:
            cls = transformers.AutoModelForImageTextToText
            model = cls.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
            self.model, self.processor = model.eval().to(device), transformers.AutoProcessor.from_pretrained(folder)
        super().__init__(options["slots"])

    def batch(self, jobs, tells):
        template = self.processor.apply_chat_template
        prompts = [template(chat(job), add_generation_prompt=True, tokenize=False) for job in jobs]
        settings = {"padding": True, "padding_side": "left", "add_special_tokens": False, "return_tensors": "pt"}
        pictures = [job.picture for job in jobs if job.picture is not None]
        inputs = self.processor(text=prompts, images=pictures or None, **settings)
        never = self.model.config.get_text_config().vocab_size
        self.model.generate(
            **inputs.to(self.model.device, self.model.dtype),
            max_new_tokens=max(job.new_tokens for job in jobs),
            do_sample=False,
            eos_token_id=never,
            streamer=Steps(lambda tokens: self.step(jobs, tells, tokens.tolist())),
        )

    def text(self, job):
        return self.processor.tokenizer.decode(job.said, skip_special_tokens=True)


class Steps:
    """transformers calls `put` with the prompt, then with every step's tokens."""

    def __init__(self, step):
        self.step, self.prompt = step, True

    def put(self, tokens):
        if not self.prompt:
            self.step(tokens)
        self.prompt = False

    def end(self):
        pass


class OpenVino:
    """OpenVINO GenAI's continuous batching, its steps run by a thread; in float32, as the model was exported."""

    def __init__(self, folder, options):
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.openvino, self.genai = numpy, openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs, scheduler.cache_size = options["slots"], 1  # GB
        scheduler.enable_prefix_caching = False
        threads = int(os.environ["OMP_NUM_THREADS"])
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", settings)
        self.inbox, self.number = queue.SimpleQueue(), 0
        threading.Thread(target=self.serve, daemon=True).start()

    begin, about, answer = Batches.begin, Batches.about, Batches.answer

    def serve(self):
        running = {}
        while True:
            while not running or not self.inbox.empty():
                job, tell = self.inbox.get()
                running[self.add(job)] = job, tell
            self.pipeline.step()
            for handle, (job, tell) in list(running.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        for token in output.generated_ids:
                            job.token(token)
                if len(job.tokens) >= job.new_tokens:
                    del running[handle]
                    tell()

    def add(self, job):
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = job.new_tokens, True, False
        pictures = [] if job.picture is None else [self.openvino.Tensor(self.numpy.array(job.picture)[None])]
        self.number += 1
        return self.pipeline.add_request(self.number, job.text, pictures, config)

    def text(self, job):
        return self.pipeline.get_tokenizer().decode(job.said)


class LlamaServer:
    """llama.cpp's server with as many slots, asked over HTTP on this machine; K/V in float32, as the weights."""

    def __init__(self, folder, options):
        import subprocess

        threads, slots = os.environ["OMP_NUM_THREADS"], options["slots"]
        self.port = options["port"]
        command = [options["server"], "-m", f"{folder}/model-f32.gguf", "--mmproj", f"{folder}/mmproj-f32.gguf"]
        command += ["-np", str(slots), "-c", str(slots * options["max_len"]), "-t", threads, "-tb", threads]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "-ctk", "f32", "-ctv", "f32", "--jinja"]
        command += ["--threads-http", "4", "--no-webui", "--cache-ram", "0", "-fa", "on"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr)
        atexit.register(self.process.terminate)  # however this process ends: the others are measured without it
        end = time.monotonic() + 60
        while not asyncio.run(self.healthy()):
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError("llama.cpp's server does not start")
            time.sleep(0.2)

    begin, about, text = Batches.begin, Batches.about, Dyvte.text

    async def healthy(self):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        status = await reader.readline()
        writer.close()
        return b"200" in status

    async def answer(self, job):
        content = [{"type": "text", "text": job.text}]
        if job.picture is not None:
            file = io.BytesIO()
            job.picture.save(file, "png")
            data = base64.b64encode(file.getvalue()).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        settings = {"max_tokens": job.new_tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
        message = {"messages": [{"role": "user", "content": content}], "stream": True, **settings}
        body = json.dumps(message | {"stream_options": {"include_usage": True}, "return_progress": False}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        said, usage = b"", {}
        while line := await reader.readline():
            said += line
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            if chunk.get("choices") and chunk["choices"][0]["delta"].get("content") is not None:
                job.token(chunk["choices"][0]["delta"]["content"])
        writer.close()
        if usage.get("completion_tokens") != job.new_tokens:
            raise RuntimeError(f"llama.cpp's server says {said[-300:]!r}")


ENGINES = {
    "dyvte": Dyvte,
    "release": Release,
    "transformers": Transformers,
    "openvino": OpenVino,
    "llama.cpp": LlamaServer,
}


def opened(picture):
    return None if picture is None else Image.open(picture).convert("RGB")


def answered(engine, run):
    """When everything came, in seconds from the run's start."""
    jobs = [Job(**{**job, "picture": opened(job["picture"])}) for job in run["jobs"]]
    engine.begin(run)
    start = asyncio.run(offer(engine.answer, jobs, run.get("clients")))
    found = [
        {"asked": j.asked - start, "tokens": [t - start for t in j.tokens], "text": engine.text(j), **j.more}
        for j in jobs
    ]
    return {"jobs": found, **engine.about(start)}


def end(args):
    """After an error in a thread: nobody would answer those who wait for it."""
    threading.__excepthook__(args)
    sys.stderr.flush()
    os._exit(1)


def main():
    threading.excepthook = end
    name, folder, options = sys.argv[1:4]
    sys.path.pop(0)  # this file's folder: `kernels` there is not the package that transformers looks for
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes elsewhere
    os.dup2(2, 1)
    engine = ENGINES[name](folder, json.loads(options))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answered(engine, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
