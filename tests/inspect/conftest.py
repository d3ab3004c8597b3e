import json

import pytest

from dyvte_engine import EXAMPLES, Engine
from dyvte_engine.inspect import run
from dyvte_engine.inspect.run import Inspector

SHIPPED = json.loads((EXAMPLES / "examples.json").read_text())
QUESTION, PICTURE = SHIPPED[0]["prompt"], EXAMPLES / SHIPPED[0]["file"]


@pytest.fixture(scope="session")
def inspector():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_TIMED_S", 0.02)  # how long prefills are timed
        yield Inspector(Engine.from_pretrained("nano", device="cpu", dtype="float32"), "nano")
