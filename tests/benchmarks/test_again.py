"""`benchmarks.again` at its smallest: what its JSON holds. No time is tested."""

import json

from benchmarks import again
from tests import tiny


def test_it_asks_about_one_picture(tmp_path):
    model, out = tiny.save(tmp_path / "tiny"), tmp_path / "out"
    sizes = ("--questions", "3", "--turns", "2", "--pictures", "2", "--rounds", "2", "--seconds", "0", "--fresh", "2")
    again.main(["--model", model, *sizes, "--out", str(out)])
    data = json.loads((out / "again.json").read_text())
    assert (out / "again.png").exists()
    assert [c["kept"] for c in data["cases"]] == 3 * [again.NOTHING, again.PICTURES, again.ALL, again.TEXT]
    assert [c["kept"] for c in data["chat"]] == [c["kept"] for c in data["cases"]]
    for c in data["cases"]:
        for part in ("first", "later"):
            assert 0 < c[part]["q1"] <= c[part]["median"] <= c[part]["q3"]
        n = 3 if c["kept"] in (again.ALL, again.TEXT) else 2
        assert len(c["medians"]) == n and c["later"]["n"] == (n - 1) * c["first"]["n"]
        assert c["totals"] == {"1": c["medians"][0], "2": sum(c["medians"][:2])}
    for kept in data["store"]:
        assert kept["bytes"] == kept["formula"] > 0 and kept["visual_tokens"] == tiny.VISUAL_TOKENS
        assert 0 < kept["rows_reused"] < kept["rows"]
    assert [s["questions"] for s in data["set"]] == 3 * [8] and all(len(s["seconds"]) == 2 for s in data["set"])
    text = again.section("again", data)
    assert data["command"] in text and text.count("| ") > 40
