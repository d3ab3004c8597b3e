import json

import pytest

from dyvte_engine import EXAMPLES, Engine
from dyvte_engine.inspect.run import Inspector

SHIPPED = json.loads((EXAMPLES / "examples.json").read_text())
QUESTION, PICTURE = SHIPPED[0]["prompt"], EXAMPLES / SHIPPED[0]["file"]


@pytest.fixture(scope="session")
def inspector():
    return Inspector(Engine.from_pretrained("nano", device="cpu", dtype="float32"), "nano")
