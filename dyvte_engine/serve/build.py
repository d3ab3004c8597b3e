"""From names and numbers, as a command line or a configuration file has them, to an app with its model loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from ..engine import Engine
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
        model: folder, hub id or "nano". Its name for clients is options["model_name"], else the last part of a folder.
        policy, allow_policy: notations, with "auto" for the heads that came with the model.
        engine, media, options: arguments of `Engine.from_pretrained`, `MediaLimits` and `ServeOptions`.

    Raises:
        DyvteError: the model cannot be loaded, or a policy cannot run on it.
    """
    chosen = policy_for(policy, model)
    named = {text: policy_for(text, model) for text in dict.fromkeys(["keep-all", *allow_policy])}
    loaded = Engine.from_pretrained(model, chosen, **(engine or {}))
    name = Path(model).resolve().name if os.path.isdir(model) else model
    given = {"model_name": name, **(options or {})}
    limits = MediaLimits(**(media or {}))
    return create_app(loaded, ServeOptions(policies={policy: chosen, **named}, media=limits, **given))
