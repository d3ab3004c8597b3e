"""What the operator of a server decides: names, keys, policies, and bounds on what one request may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..policies import VisualTokenPolicy


@dataclass(frozen=True)
class MediaLimits:
    """Of all pictures and videos of one request together; a frame of a video counts as pixels too.

    Attributes:
        domains: hosts that http(s) URLs may name, exactly; with none, nothing is ever fetched.
        fetch_seconds: for one URL, redirects included.
    """

    images: int = 16
    videos: int = 2
    bytes: int = 24 * 2**20
    pixels: int = 50_000_000
    frames: int = 512
    domains: tuple[str, ...] = ()
    fetch_seconds: float = 10.0
    redirects: int = 3


@dataclass(frozen=True)
class ServeOptions:
    """Options of `create_app`.

    Attributes:
        model_name: that requests name and answers carry.
        api_keys: one of them must come as `Authorization: Bearer KEY`, except for /health; none: no key is asked for.
        policies: what requests may write in `policy`, and what it means.
        max_queue: answers that may wait beyond the engine's max_batch; more get 429.
        max_choices: `n` times prompts of one request.
        max_text_characters: of all messages or prompts together.
        body_bytes, body_seconds: the size of a request's body, and the time in which it must have come.
        bodies_bytes: of all requests' bodies together that are under way; more get 503.
        linger_seconds: a client that sends too much may send on for so long, to read its refusal.
        stall_seconds: a stream whose reader takes nothing for so long is closed.
        threads: that decode pictures and tokenize.
        replica: what answers carry as x-replica; none by default.
    """

    model_name: str = "nano"
    api_keys: tuple[str, ...] = ()
    policies: Mapping[str, VisualTokenPolicy | str] = field(default_factory=lambda: {"keep-all": "keep-all"})
    media: MediaLimits = field(default_factory=MediaLimits)
    max_queue: int = 64
    max_choices: int = 8
    max_logprobs: int = 20
    max_stops: int = 16
    max_stop_characters: int = 256
    max_schema_characters: int = 32_768
    max_text_characters: int = 500_000
    body_bytes: int = 36 * 2**20
    body_seconds: float = 60.0
    bodies_bytes: int = 512 * 2**20
    linger_seconds: float = 2.0
    stall_seconds: float = 60.0
    threads: int = 2
    replica: str | None = None
