"""From names and numbers, as a command line or a configuration file has them, to an app with its model loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from PIL import Image

from ..engine import Engine
from ..errors import InvalidArgumentError
from ..policies.auto import policy_for
from .app import create_app
from .options import MediaLimits, ServeOptions


def build(
    model: str,
    policy: str = "auto",
    allow_policy: Sequence[str] = (),
    engine: Mapping[str, Any] | None = None,
    media: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> FastAPI:
    """Load the model and make the app.

    Args:
        model: a folder, hub id, "nano" or "smol". Clients know it by options["model_name"], else by its last part.
        policy: a notation, with "auto" for the heads that came with the model.
        allow_policy: such notations, or NAME=NOTATION, which one that names a file of this machine must have.
        engine, media, options: arguments of `Engine.from_pretrained`, `MediaLimits` and `ServeOptions`.

    Raises:
        DyvteError: the model cannot be loaded, or a policy cannot run on it.
    """
    own = "default" if "/" in policy else policy
    notations = _by_name([(own, policy), ("keep-all", "keep-all"), *map(_named, allow_policy)])
    policies = {name: policy_for(text, model) for name, text in notations.items()}
    name = Path(model).resolve().name if os.path.isdir(model) else model
    limits = MediaLimits(**(media or {}))
    served = ServeOptions(policies=policies, media=limits, **{"model_name": name, **(options or {})})
    loaded = Engine.from_pretrained(model, policies[own], **(engine or {}))
    # Frames of a GIF may outgrow its first one. PIL's bound is the process's, and an error from twice its value.
    Image.MAX_IMAGE_PIXELS = limits.pixels // 2
    return create_app(loaded, served)


def _by_name(named: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Raises InvalidArgumentError where one name is to mean two policies."""
    found: dict[str, str] = {}
    for name, notation in named:
        if found.setdefault(name, notation) != notation:
            given = f"allow_policy names {name!r} twice, {found[name]!r} and {notation!r}"
            raise InvalidArgumentError(f"{given}; accepted: a name for each")
    return found


def _named(text: str) -> tuple[str, str]:
    """The name for clients, and the notation. Clients must not read paths."""
    found = re.fullmatch(r"([\w-]+)=(.+)", text)
    name, notation = (found[1], found[2]) if found else (text, text)
    if "/" in name:
        raise InvalidArgumentError(f"allow_policy is {text!r}, which clients would read; accepted: NAME={text}")
    return name, notation
