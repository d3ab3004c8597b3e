"""For the reference in docs/: an entry "a, b: text" of a docstring is about both names, not about `a` of a type `b`."""

from __future__ import annotations

import re
from typing import Any

import griffe

NAMES = re.compile(r"^ +(?:\w+, )+\w+(?=: )", re.MULTILINE)
THIN_SPACE = "\u2009"  # at an ordinary one the parser would end the name


class SeveralNames(griffe.Extension):
    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = NAMES.sub(lambda names: names[0].replace(", ", f",{THIN_SPACE}"), obj.docstring.value)
