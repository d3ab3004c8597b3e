"""The server's process: uvicorn with this project's signals and log lines."""

from __future__ import annotations

import logging
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import SourceError
from .front import access, log


class Server(uvicorn.Server):
    """The first signal drains: no new requests, those under way to their end. A second one ends it."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        app = self.config.app
        if isinstance(app, FastAPI):
            app.state.service.draining = True
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def serve(app: FastAPI, host: str, port: int, drain_seconds: int, max_connections: int) -> None:
    """Listen until a signal.

    Raises:
        SourceError: the address is not free, or not of this machine.
        CacheError: pages of the K/V pool are still held at the end, which is a bug.
    """
    _log_to_stderr()
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        limit_concurrency=max_connections,
        timeout_graceful_shutdown=drain_seconds,
    )
    Server(config).run(sockets=[listen(host, port)])
    app.state.service.engine.check_integrity()


def listen(host: str, port: int) -> socket.socket:
    """A socket for uvicorn to listen on, announced in the log. Raises SourceError as `serve` does."""
    listening = _bound(host, port)
    log.warning("listening on http://%s:%d", f"[{host}]" if ":" in host else host, listening.getsockname()[1])
    return listening


def check_address(host: str, port: int) -> None:
    """Raises SourceError as `serve` does, without taking the address."""
    _bound(host, port).close()


def _bound(host: str, port: int) -> socket.socket:
    if not host:  # which the system takes for all addresses, as of a variable that nobody has set
        raise SourceError("host is ''; accepted: an address of this machine, 0.0.0.0 for all")
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, UnicodeError) as e:  # a name that no host can have
        bound.close()
        reason = getattr(e, "strerror", None) or e
        raise SourceError(f"host {host!r}, port {port}: {reason}; accepted: a free port of this machine") from e
    return bound


def _log_to_stderr() -> None:
    """Access lines are JSON objects and nothing else; other lines are plain."""
    plain, bare = logging.StreamHandler(sys.stderr), logging.StreamHandler(sys.stderr)
    plain.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    bare.setFormatter(logging.Formatter("%(message)s"))
    for logger, handler, level in ((log, plain, logging.INFO), (access, bare, logging.INFO)):
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
