"""Every script of examples/ runs as a user runs it, and says what it should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {  # what the answers below rest on: nano's greedy answers, which the pictures show to be right
    "batch": ("rectangle? yellow", "red shape? triangle", "teal shape? yes", "brown shape? yes"),
    "first_answer": ("yellow", "144 visual tokens left after layer 3 of 12", "layer: 153 153 153 153 9 9 9 9 9 9 9 9"),
    "inside_transformers": ("transformers: yellow", "for one call: yellow", "for good: yellow (exit after layer 3)"),
    "many_questions": ("keep-all: ", "dynamic: ", "  brown: yes", "  green: no"),
    "many_requests": ("everything: yellow", "learned exit: yellow", "FastV and an exit: ", "sampled: "),
    "own_policy": ("yellow  [153, 153, 153, 153,", "[153, 153, 153, 57, 57, 57, 57, 57, 9, 9, 9, 9]  "),
    "streaming": ("answer 0 ended (stop): ", "answer 1 ended (stop): "),
    "train_heads": ("threshold ", "(exit after layer "),
}


def test_each_example_is_listed_and_short():
    files = sorted(EXAMPLES.glob("*.py"))
    assert [f.stem for f in files] == sorted(SAYS)
    assert [f.name for f in files if len(f.read_text().splitlines()) > 30] == []


def test_the_notebook_is_stored_without_outputs():
    """`make docs` runs it."""
    cells = json.loads((EXAMPLES / "the_exit.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.parametrize("name", SAYS)
def test_example(name, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    for words in SAYS[name]:
        assert words in ran.stdout
    assert not list(tmp_path.iterdir())
