"""Requests with their own policy and options, answered together; here awaited with asyncio (threads work as well)."""

import asyncio

from dyvte_engine import EXAMPLES, NANO_HEADS, Engine, Request

engine = Engine.from_pretrained("nano")  # its own policy keeps everything
picture, question = EXAMPLES / "7_color.png", "What color is the rectangle?"
REQUESTS = {
    "everything": Request(question, picture),
    "learned exit": Request(question, picture, policy=f"dynamic:{NANO_HEADS}", priority=1),
    "FastV and an exit": Request(question, picture, policy="fastv:2,0.5+fixed:6"),
    "sampled": Request(question, picture, policy="fixed:6", seed=3, options=dict(do_sample=True, temperature=0.8)),
}


async def ask(name: str, request: Request) -> None:
    result = await engine.submit(request).wait()
    print(f"{name}: {result.text.strip()}, {sum(result.stats.tokens_per_layer)} rows computed")


async def main() -> None:
    await asyncio.gather(*(ask(name, request) for name, request in REQUESTS.items()))


asyncio.run(main())
