"""The command line, run as a user runs it."""

import json
import random
import subprocess
import sys

import pytest

from dyvte_engine.commands import main as cli
from tests import tiny


@pytest.fixture
def run(monkeypatch, capsys):
    """main() in this process: returns exit code, stdout, and stderr with its line breaks taken out."""

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dyvte-engine", *args])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err.replace("\n", " ")

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("cli"))


def test_one_question_streams_its_answer(checkpoint, tmp_path, run):
    picture = tmp_path / "p.png"
    tiny.picture(random.Random(0)).save(picture)
    common = ("--model", checkpoint, "--image", str(picture), "--prompt", "w1 w2", "--max-new-tokens", "6")
    command = (sys.executable, "-m", "dyvte_engine.commands.main", "generate", *common, "--policy", "fixed:1")
    plain = subprocess.run(command, capture_output=True, text=True, check=True)
    code, out, _ = run("generate", *common, "--policy", "fixed:1", "--json")
    assert code == 0
    result = json.loads(out)[0]
    assert plain.stdout == result["text"] + "\n"
    assert "left after layer 1" in plain.stderr
    assert result["stats"]["exit_layer"] == 1
    assert result["stats"]["visual_tokens"] == tiny.VISUAL_TOKENS
    assert len(result["token_ids"]) == result["stats"]["new_tokens"] <= 6


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--prompt", "w1", "--image", "/nowhere/x.png"), "image file not found: /nowhere/x.png"),
        (("--prompt", "w1", "--policy", "fixed:9"), "FixedExit layer is 9; accepted: -1 to 3"),
        (("--prompt", "w1", "--policy", "maybe"), "policy 'maybe' is not understood"),
        (("--prompt", "w1", "--device", "cuda:77"), "device 'cuda:77' is not there"),
        (("--prompt", "w1", "--model", "/nowhere/model"), "cannot load /nowhere/model"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(checkpoint, args, words, run):
    model = () if "--model" in args else ("--model", checkpoint)
    code, out, err = run("generate", *model, *args)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert out == ""
