"""The command line, run as a user runs it."""

import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys

import pytest
import typer

from dyvte_engine import NANO_HEADS, ExitHeadConfig, ExitHeads
from dyvte_engine.commands import main as cli
from dyvte_engine.errors import DataError, FileError
from dyvte_engine.files import check_writable, write_bytes
from dyvte_engine.training.head_data import read_examples
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
    said = [line.split("  ")[0] for line in plain.stderr.splitlines()]
    assert said == ["visual tokens", "text tokens", "first token", "decode", "prefill", "K/V held"]  # and nothing else
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


def in_a_shell(line: str, **options) -> subprocess.CompletedProcess:
    """A shell line in which $CLI runs the command line of this checkout."""
    environment = os.environ | {"CLI": f"{sys.executable} -m dyvte_engine.commands.main"}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, **options)


def refused(code: int, err: str) -> str:
    """What the one line on stderr says."""
    assert code == 2
    assert err.startswith("error: ") and "Traceback" not in err and "Exception ignored" not in err
    assert len(err.strip().split("\n")) == 1
    return err


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("eval nano", "--out"),
        ("eval nano", "--page"),
        ("eval nano", "--answers"),
        ("sweep nano", "--plot"),
        ("analyze nano", "--out"),
        ("reproduce nano", "--out"),
        ("label nano --data nano", "--out"),
        ("train-heads /nowhere", "--out"),
        ("train-heads /nowhere --out x", "--tensorboard"),
        ("ablate-heads /nowhere", "--out"),
        ("test-heads /nowhere /nowhere", "--out"),
        ("convert /nowhere", ""),
    ],
)
@pytest.mark.parametrize("unwritable", ["below-a-file", "/proc/nowhere"])
def test_an_output_that_cannot_be_written_is_refused_first(command, option, unwritable, tmp_path, monkeypatch, run):
    """Before a model is loaded: there is none to load here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dyvte_engine.engine.load_model", None)
    (tmp_path / "file").write_text("")
    path = "file/out" if unwritable == "below-a-file" else f"{unwritable}/out"
    code, out, err = run(*command.split(), *([option] if option else []), path)
    assert code == 2 and f"{path} cannot be written: N" in err and out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        ("eval nano", "--limit", ("-1", "0", "1", "3", "9" * 23)),
        ("eval nano", "--tasks", ("", "x", "pope,x", "pope,gqa,pope")),
        ("eval nano --policy a=keep-all", "--policy", ("a=fixed:1",)),
        ("eval nano --policy keep-all", "--policy", ("keep-all",)),
        ("eval nano --out same", "--page", ("same", "./same")),
        ("eval nano --page same", "--answers", ("same",)),
        ("eval nano", "--source", ("", "x")),
        ("eval nano", "--styles", ("x", "")),
        ("eval nano --source emoji", "--styles", ("", "noto,noto")),
        ("eval nano", "--batch", ("-1", "0")),
        ("sweep nano", "--limit", ("0", "3", "9" * 23)),
        ("sweep nano", "--tasks", ("x", "pope,pope")),
        ("sweep nano --heads a.safetensors", "--heads", ("b/a.safetensors",)),
        ("sweep nano --heads a=a.safetensors", "--heads", ("a=b/a.safetensors",)),
        ("sweep nano --heads a.safetensors", "--out", ("a.safetensors",)),
        ("sweep nano --out same", "--plot", ("same",)),
        ("sweep nano", "--plot", ("x.svg", "x.txt")),
        ("sweep nano", "--batch", ("0",)),
        ("analyze nano --out x", "--limit", ("-1", "0", "3")),
        ("analyze nano --out x --data nano", "--limit", ("-1", "0")),
        ("analyze nano --out x --data nano", "--source", ("x", "emoji")),
        ("analyze nano --out x --data pope --limit 4", "--images", (".",)),
        ("analyze nano --out x", "--examples", ("-1",)),
        ("analyze nano --out x", "--seed", ("-1",)),
        ("analyze nano --out x", "--data", ("", "x", "pope,x")),
        ("analyze nano --out x", "--exits", ("", "x", "1,")),
        ("analyze nano --out x", "--batch", ("0",)),
        ("reproduce nano --out x", "--limit", ("0", "3")),
        ("reproduce nano --out x", "--batch", ("0",)),
        *(
            ("reproduce nano --out x --transfer a=" + str(NANO_HEADS), "--transfer", (f"{name}={NANO_HEADS}",))
            for name in ("a", "with", "FastV")
        ),
        ("label nano --out x --data nano", "--samples", ("0", "-1", "1000000")),
        ("label nano --out x --data nano", "--images", (".",)),
        ("label nano --out x --data nowhere.json", "--images", ("nowhere",)),
        ("label nano --out x --data nano --samples 3", "--mode", ("", "x")),
        *(
            ("label nano --out x --data nano --samples 3", f"--{name}", ("0", "-1"))
            for name in ("batch", "shard", "max-new-tokens")
        ),
        ("train-heads /nowhere --out x", "--lr", ("0", "-1", "nan", "inf")),
        ("train-heads /nowhere --out x", "--states", ("", "x")),
        ("train-heads /nowhere --out x", "--save-every", ("0",)),
        *(
            ("train-heads /nowhere --out x", f"--{name}", ("0", "-1"))
            for name in ("epochs", "batch", "hidden", "delta")
        ),
        ("train-heads /nowhere --out x", "--seed", ("9" * 23,)),
        *(("ablate-heads /nowhere --out x", f"--{name}", ("0", "-1")) for name in ("epochs", "hidden", "lr")),
        ("test-heads /nowhere a.safetensors", "--out", ("a.safetensors",)),
        ("serve nano --port 0", "--host", ("",)),
        ("serve nano --port 0", "--api-key", ("", " ", " a", "a\tb")),
        ("serve nano --port 0", "--served-model-name", ("", " ")),
        ("serve nano --port 0", "--allow-domain", ("", "https://example.org", "example.org:80", "example.org/a")),
        ("serve nano --port 0 --allow-policy a=fixed:1", "--allow-policy", ("a=fixed:2", "keep-all=fixed:2")),
        ("serve nano --port 0", "--threads", ("0", "1025", "9" * 23)),
        ("inspect nano --port 0", "--host", ("",)),
    ],
)
def test_a_value_is_refused_under_the_name_of_its_option(command, option, values, tmp_path, monkeypatch, run):
    """Before a model is loaded: there is none to load here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dyvte_engine.engine.load_model", None)
    for value in values:
        code, out, err = run(*command.split(), option, value)
        assert re.search(rf"\b({option[2:]}|{option[2:].replace('-', '_')})\b", err), err
        assert code == 2 and out == "" and "Traceback" not in err
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["serve", "inspect"])
def test_a_port_that_is_taken_is_refused_before_a_model_is_loaded(command, monkeypatch, run):
    monkeypatch.setattr("dyvte_engine.engine.load_model", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, out, err = run(command, "nano", "--port", port)
    assert (code, out) == (2, "") and f"port {port}: Address already in use" in err


@pytest.mark.parametrize(
    "command",
    [
        "eval MODEL --tasks pope --policy keep-all --policy fixed:99",
        "sweep MODEL --tasks pope --heads HEADS",
        "reproduce MODEL --heads FITTING --transfer other=HEADS --out x",
        "analyze MODEL --data pope --limit 4 --heads none --exits 0,99 --out x",
        "analyze MODEL --data pope --limit 4 --heads none --exits 1,1 --out x",
    ],
)
def test_what_cannot_run_on_the_model_is_refused_before_it_answers(command, checkpoint, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dyvte_engine.engine.Engine.generate", None)
    fitting = tmp_path / "fitting.safetensors"
    heads_of(4).save(fitting)
    for word, stands_for in (("MODEL", checkpoint), ("HEADS", str(NANO_HEADS)), ("FITTING", str(fitting))):
        command = command.replace(word, stands_for)
    code, out, err = run(*command.split())
    assert (code, out) == (2, "") and ("accepted: " in err or "the model has" in err)
    assert [p.name for p in tmp_path.iterdir()] == ["fitting.safetensors"]


def heads_of(layers: int) -> ExitHeads:
    """For the checkpoints of `tests.tiny`."""
    return ExitHeads(ExitHeadConfig(64, layers, 8))


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_model_of_few_layers_is_swept(layers, tmp_path, run):
    model, heads = tiny.save(tmp_path / "model", layers=layers), tmp_path / "heads.safetensors"
    heads_of(layers).save(heads)
    code, out, err = run("sweep", model, "--heads", str(heads), "--tasks", "pope", "--limit", "4")
    if layers == 1:
        assert (code, out) == (2, "") and "model has 1 layer; accepted: at least 2" in err
    else:
        assert code == 0 and out.startswith("# When to let go: model") and "| never |" in out


def test_a_sweep_says_what_it_leaves_out(run):
    code, out, err = run("sweep", "nano", "--tasks", "sqa", "--limit", "4")
    assert (code, out) == (2, "") and 'sqa: 4 in the form "multiple choice" left out' in err and "--all-forms" in err


def test_what_shapes_the_distribution_turns_sampling_on(checkpoint, run):
    asked = ("generate", "--model", checkpoint, "--prompt", "w1 w2", "--max-new-tokens", "8", "--json")
    texts = {}
    for option in ((), ("--temperature", "1"), ("--top-k", "60"), ("--top-p", "0.99"), ("--min-p", "0.0001")):
        answers = [json.loads(run(*asked, *option, "--seed", seed)[1])[0]["token_ids"] for seed in ("1", "2")]
        texts[option] = answers
    (greedy, again), *drawn = texts.values()
    assert greedy == again and all(a != b and greedy not in (a, b) for a, b in drawn)


def test_frames_a_second_are_checked_where_there_is_no_video(checkpoint, run):
    for value in ("nan", "inf", "0", "-1"):
        code, out, err = run("generate", "--model", checkpoint, "--prompt", "w1", "--video-fps", value)
        assert (code, out) == (2, "") and "video_fps is" in err


def test_labels_that_do_not_fit_into_memory_begin_no_run(checkpoint, tmp_path, run):
    (tmp_path / "q.jsonl").write_text('{"image": "p.png", "prompt": "w1"}\n')
    tiny.picture(random.Random(0)).save(tmp_path / "p.png")
    asked = ("label", checkpoint, "--data", str(tmp_path / "q.jsonl"), "--mode", "self", "--out", str(tmp_path / "x"))
    code, _, err = run(*asked, "--batch", "1" + "0" * 9)
    assert code == 2 and "lower max_batch" in err and not (tmp_path / "x").exists()


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    for write in (check_writable, lambda path: write_bytes(path, b"x")):
        for name in ("a\0b", "a" * 300, "a" * 300 + "/b"):
            with pytest.raises(FileError, match="cannot be written"):
                write(tmp_path / name)
    with pytest.raises(DataError, match=r"data: .* cannot be read: embedded null byte"):
        read_examples("a\0.json")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line():
    """`doctor` prints a page; stdout is a device that is always full."""
    done = in_a_shell("$CLI doctor --json > /dev/full")
    assert "No space left on device" in refused(done.returncode, done.stderr)
    done = in_a_shell("$CLI doctor 2>&1 > /dev/full")
    assert "No space left on device" in refused(done.returncode, done.stdout)


def test_a_closed_pipe_is_one_line(checkpoint):
    line = f"set -o pipefail; $CLI generate --model {checkpoint} --prompt 'w1 w2' --max-new-tokens 4 | true"
    for case in (line, "set -o pipefail; $CLI doctor --json | true"):
        done = in_a_shell(case)
        assert "the output was closed" in refused(done.returncode, done.stderr)


def test_a_limit_on_file_sizes_leaves_what_was_there(tmp_path):
    """Found before the model is loaded."""
    (tmp_path / "out.json").write_text("old")
    done = in_a_shell(f"ulimit -f 1; $CLI eval nano --out {tmp_path}/out.json")
    assert "out.json cannot be written: File too large" in refused(done.returncode, done.stderr)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("out.json", "old")]


def test_no_part_of_a_file_is_left_when_the_disk_fills_up(tmp_path):
    code = (
        "import resource; from dyvte_engine.heads.exit_head import ExitHeadConfig, ExitHeads\n"
        "from dyvte_engine.errors import FileError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: ExitHeads(ExitHeadConfig(64, 4)).save('heads.safetensors')\n"
        "except FileError as e: print(e)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.stdout == "heads.safetensors cannot be written: File too large\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_brackets_are_text(checkpoint, tmp_path, run, monkeypatch):
    """Of a path, which may look like rich's markup, and of the name of an extra."""
    folder = tmp_path / "a[bold]b[/x]"
    code, _, err = run("generate", "--model", str(folder), "--prompt", "w1")
    assert code == 2 and f"cannot load {folder}" in err
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    monkeypatch.delitem(sys.modules, "dyvte_engine.training.nano.easy", raising=False)
    code, _, err = run("eval", "nano", "--tasks", "easy-vqa")
    assert code == 2 and err.strip().endswith("pip install 'dyvte-engine[eval]'")
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, _, err = run("eval", "nano", "--tasks", "pope", "--source", "emoji")
    assert code == 2 and err.strip().endswith("pip install 'dyvte-engine[eval]'")


GROUP = typer.main.get_command(cli.app)
PANELS = ("Answer questions", "Train exit heads", "Judge a model", "Tools")


def test_the_help_groups_the_commands(run):
    code, out, _ = run("--help")
    heads = re.findall(r"^╭─ ([\w ]+) ─", out, re.MULTILINE)
    assert code == 0 and heads == ["Options", *PANELS]
    assert all(command.rich_help_panel in PANELS for command in GROUP.commands.values())


@pytest.mark.parametrize("name", sorted(GROUP.commands))
def test_a_command_explains_itself(name, tmp_path, monkeypatch):
    """One short line in the list, a line for each option, and examples that are understood."""
    monkeypatch.chdir(tmp_path)
    command = GROUP.commands[name]
    first, *_ = (command.help or "").split("\n\n")
    assert first.endswith(".") and len(first) <= 70 and "\n" not in first
    assert [p.name for p in command.params if p.name != "help" and not getattr(p, "help", None)] == []
    start, *examples = (command.epilog or "").split("\n\n")
    assert start == "For example:" and examples
    for example in examples:
        program, called, *args = shlex.split(example)
        assert (program, called) == ("dyvte-engine", name)
        with command.make_context(name, args):
            pass


def test_python_m_runs_the_command_line():
    done = subprocess.run([sys.executable, "-m", "dyvte_engine", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"dyvte-engine {cli.__version__}\n", "")


def test_a_shell_completes_commands_and_options():
    def completed(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        env = os.environ | words | {"_DYVTE_ENGINE_COMPLETE": "complete_bash"}
        code = "import sys; sys.argv[0] = 'dyvte-engine'; from dyvte_engine.commands.main import main; main()"
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.split()

    assert completed("dyvte-engine tr") == ["train-heads"]
    assert completed("dyvte-engine sweep --pl") == ["--plot"]


def test_unknown_commands_and_options_have_exit_code_2(run):
    for args in (("nothing",), ("doctor", "--nothing"), ("sweep", "--limit=x")):
        code, out, err = run(*args)
        assert (code, out) == (2, "") and args[-1].split("=")[0] in err


def test_the_profiler_of_the_benchmarks_is_silent():
    code = (
        "import torch; from benchmarks.common import peak_bytes;"
        "print(peak_bytes(lambda: torch.ones(1000), torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("4000\n", "")


@pytest.mark.parametrize("command", ["analyze nano --out x", "sweep nano --plot x.png"])
def test_what_draws_asks_for_matplotlib_first(command, tmp_path, monkeypatch, run):
    """Before a model is loaded: there is none to load here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dyvte_engine.engine.load_model", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run(*command.split())
    assert (code, out) == (2, "") and err.strip().endswith(
        "matplotlib is not installed; pip install 'dyvte-engine[eval]'"
    )


def test_an_evaluation_in_a_file_shows_no_bar(checkpoint):
    args = ("eval", checkpoint, "--tasks", "pope", "--limit", "4", "--policy", "keep-all", "--all-forms")
    done = subprocess.run([sys.executable, "-m", "dyvte_engine", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pope" in done.stdout and done.stderr == ""
