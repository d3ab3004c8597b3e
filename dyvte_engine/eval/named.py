"""Policies under the names they have in tables and answers files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..assets import heads_of
from ..checks import check_names
from ..policies import VisualTokenPolicy
from ..policies.auto import policy_for


class Named(NamedTuple):
    """A policy with its name in the table and what tells it apart in the answers file."""

    name: str
    policy: VisualTokenPolicy
    identity: str


def named(text: str, model: str) -> Named:
    """ "light=dynamic:light.safetensors"; without a name the notation is the name."""
    name, sign, rest = text.partition("=")
    if not (sign and name.strip()) or ":" in name:
        name = rest = text
    files = [part.partition(":")[2].partition(",")[0] for part in rest.split("+")]
    files += [str(heads_of(model))] if rest == "auto" else []
    digests = [hashlib.sha256(Path(f).read_bytes()).hexdigest()[:16] for f in files if f and Path(f).is_file()]
    return Named(name.strip(), policy_for(rest, model), " ".join([rest, *digests]))


def all_named(texts: Sequence[str], model: str) -> list[Named]:
    """Each as `named` reads it. Raises InvalidArgumentError where two have one name, of which a table shows one."""
    found = [named(text, model) for text in texts]
    check_names("policy", [policy.name for policy in found])
    return found
