"""What the operator of a server decides: names, keys, policies, and bounds on what one request may ask for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from ..errors import InvalidArgumentError
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

    def __post_init__(self) -> None:
        """Raises InvalidArgumentError for a domain that no URL could name: nothing would ever be fetched from it."""
        for domain in self.domains:
            if not _is_host(domain):
                raise InvalidArgumentError(
                    f"allow_domain is {domain!r}; accepted: a host, as example.org, without https:// and port"
                )


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

    def __post_init__(self) -> None:
        """Raises InvalidArgumentError for a key that everybody has or nobody could send, and for an empty name."""
        for number, key in enumerate(self.api_keys):
            if not key or key != key.strip() or not key.isprintable():
                given = f"api_key {number} is empty, or has blanks around it or characters that do not print"
                raise InvalidArgumentError(f"{given}; accepted: text that fits into a header")
        if not self.model_name.strip():
            raise InvalidArgumentError(f"served_model_name is {self.model_name!r}; accepted: some text")


def _is_host(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return re.fullmatch(r"[A-Za-z0-9._-]+", text) is not None
    return True
