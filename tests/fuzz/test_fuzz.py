"""A short run of the fuzzer (`make fuzz` is the long one): odd arguments give a right answer or a DyvteError."""

import pytest

from tests.fuzz.__main__ import run
from tests.fuzz.calls import CALLS


@pytest.fixture(scope="module")
def findings():
    return run(0, 500, float("inf"), seed=0)


@pytest.mark.parametrize("kind", ["process", *(call.__name__ for call in CALLS)])
def test_odd_arguments(kind, findings):
    assert {at: cases[0] for at, cases in findings.items() if at[0] == kind} == {}
