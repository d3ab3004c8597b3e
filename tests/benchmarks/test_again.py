"""`benchmarks.again` at its smallest: what its JSON holds. No time is tested."""

import json

from benchmarks import again
from tests import tiny


def test_it_asks_about_one_picture(tmp_path):
    model, out = tiny.save(tmp_path / "tiny"), tmp_path / "out"
    again.main(["--model", model, "--questions", "3", "--seconds", "0", "--out", str(out)])
    data = json.loads((out / "again.json").read_text())
    assert (out / "again.png").exists()
    assert [c["kept"] for c in data["cases"]] == 2 * [again.NOTHING, again.PICTURES, again.ALL, again.TEXT]
    for c in data["cases"]:
        for part in ("first", "later"):
            assert 0 < c[part]["q1"] <= c[part]["median"] <= c[part]["q3"]
        assert len(c["medians"]) == 3 and c["later"]["n"] == 2 * c["first"]["n"]
    deep, shallow = data["kept_bytes"].values()
    assert deep > shallow > 0 and data["visual_tokens"] == tiny.VISUAL_TOKENS
