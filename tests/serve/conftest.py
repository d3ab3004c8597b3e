import pytest

from dyvte_engine import NANO_HEADS, DynamicExit, Engine

from .common import Asgi, ServeOptions


@pytest.fixture(scope="session")
def engine():
    made = Engine.from_pretrained("nano", DynamicExit.from_file(NANO_HEADS), device="cpu", max_batch=4)
    made.warm_up()
    return made


@pytest.fixture(scope="session")
def app(engine):
    policies = {"keep-all": "keep-all", "dynamic:auto,0.5": DynamicExit.from_file(NANO_HEADS, 0.5)}
    return Asgi(engine, ServeOptions(policies=policies))
