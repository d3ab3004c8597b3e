"""The commands that try the server for long: their short forms, and their records in the documentation."""

import asyncio
import importlib
import json

import pytest

from benchmarks.report import into_page
from tools import serve_compat, serve_load, serve_page

from . import faults

COMMANDS = {"faults": faults, "compat": serve_compat, "load": serve_load}


def test_a_hundred_and_fifty_requests_every_fifth_broken(tmp_path):
    found = faults.campaign(list(range(150)), seed=7, pool=16, seconds=120, log=tmp_path / "log")
    assert found["findings"] == []
    assert found["requests"] == 150 and found["statuses"]["good"]["right"] > 100


def test_a_wrong_answer_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "_shown", lambda text, end, stop: (text + "!", end))
    found = faults.campaign(list(range(6)), seed=0, pool=2, seconds=60, log=tmp_path / "log")
    assert found["findings"] and all("wanted" in one for one in found["findings"])


def test_a_server_that_ends_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(faults.Campaign, "_one", lambda self, client, number: asyncio.sleep(0, self.server.kill()))
    found = faults.campaign([0, 1], seed=0, pool=1, seconds=60, log=tmp_path / "log")
    assert any("ended by itself with -9" in one for one in found["findings"])


def records() -> list[str]:
    return sorted(path.stem for path in serve_page.RECORDS.glob("*.json"))


@pytest.mark.parametrize("name", records())
def test_the_page_shows_the_records(name):
    if name == "ray":
        pytest.importorskip("ray.serve")
    module = COMMANDS.get(name) or importlib.import_module("tests.serve.cluster")
    page = serve_page.PAGE.read_text()
    assert into_page(page, name, serve_page.text(module.sheets(serve_page.record(name)))) == page


def test_figures_of_guidellm_are_read():
    """A report cut down to what is read."""
    waits = {"successful": {"percentiles": {"p50": 1.0, "p95": 2.0, "p99": 3.0}}}
    metrics = {
        "requests_per_second": {"successful": {"mean": 4.0}},
        "output_tokens_per_second": {"successful": {"mean": 5.0}},
        "time_to_first_token_ms": waits,
        "inter_token_latency_ms": waits,
        "request_totals": {"successful": 6, "incomplete": 1, "errored": 0, "total": 7},
    }
    report = {"metrics": metrics, "config": {"strategy": {"streams": 16}}}
    machine = {"cpu": "one", "threads": 2, "load": 0.1}
    found = {"machine": machine, "guidellm": "guidellm==1", "seconds": 2.0, "slots": 3, "tokens": 4}
    found |= {"servers": {"ours": [serve_load._figures(report)]}, "missing": {"theirs": "it is not here"}}
    text = serve_page.text(serve_load.sheets(json.loads(json.dumps(found))))
    assert "| ours | 16 | 4.0 | 5 | 1.0 / 2.0 / 3.0 | 1.0 / 2.0 / 3.0 | 0 |" in text
    assert "| theirs | not measured: it is not here |" in text
