"""Folders with code of their own and files that name it: none of it runs, and nobody is asked whether it may."""

import ast
import io
import json
import sys
from pathlib import Path

import pytest
import transformers
from transformers.dynamic_module_utils import resolve_trust_remote_code

import dyvte_engine
from dyvte_engine import DyvteError, Engine, ModelError
from dyvte_engine.models.original import convert
from dyvte_engine.models.strict import nobody_asked
from tests import tiny
from tests.families import test_eagle, test_original, test_vila

AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")


@pytest.fixture
def yes(monkeypatch):
    """A terminal whose user agrees to everything."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    asked = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    yield
    assert not asked


def trap(folder, marker, unknown):
    """Name code in every JSON file of `folder`; with `unknown` transformers has no code of its own."""
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w').write('ran')\nclass Trap: pass\n")
    named = {name: ["code.Trap", "code.Trap"] if name == "AutoTokenizer" else "code.Trap" for name in AUTO}
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        file = folder / name
        if name != "config.json" and not file.exists():
            continue
        stored = json.loads(file.read_text()) if file.exists() else {}
        kinds = ("model_type", "tokenizer_class", "image_processor_type", "processor_class")
        changed = {kind: f"trap{stored[kind]}" for kind in kinds if unknown and kind in stored}
        file.write_text(json.dumps({**stored, **changed, "auto_map": named}))


def decoder(folder):
    test_eagle.decoder().save_pretrained(folder)
    test_original.write_tokenizer(folder)


def without_a_processor_class(folder):
    """What names the processor is only the model's type: transformers then loads its parts by itself."""
    tiny.save(folder)
    transformers.AutoProcessor.from_pretrained(folder).image_processor.save_pretrained(folder)
    (folder / "processor_config.json").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    stored = json.loads(file.read_text())
    stored.pop("processor_class", None)
    file.write_text(json.dumps({**stored, "tokenizer_class": "Trapped"}))


def load(folder, tmp_path):
    Engine.from_pretrained(folder, dtype="float32", device="cpu", max_len=64)


def convert_it(folder, tmp_path):
    clip = test_original.write_tower(tmp_path / "clip", test_original.source_model())
    convert(folder, tmp_path / "out", clip)


def convert_with_it(folder, tmp_path):
    convert(test_original.write(tmp_path / "source", test_original.source_model()), tmp_path / "out", folder)


LOADERS = {
    "transformers": (lambda f: tiny.save(f), [""], load),
    "no processor class": (without_a_processor_class, [""], load),
    "decoder": (decoder, [""], load),
    "vila": (lambda f: test_vila.write(f), ["llm", "vision_tower", "mm_projector"], load),
    "eagle": (lambda f: test_eagle.write(f / "x", test_eagle.decoder()), ["x"], lambda f, t: load(f / "x", t)),
    "original": (
        lambda f: test_original.write(f / "x", test_original.source_model()),
        ["x"],
        lambda f, t: convert_it(f / "x", t),
    ),
    "tower": (lambda f: test_original.write_tower(f, test_original.source_model()), [""], convert_with_it),
}


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("kind", LOADERS)
def test_no_code_of_a_checkpoint_runs(kind, unknown, tmp_path, yes, monkeypatch):
    write, parts, run = LOADERS[kind]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = tmp_path / "folder", tmp_path / "marker"
    folder.mkdir()
    write(folder)
    for part in parts:
        trap(folder / part, marker, unknown)
    try:
        run(folder, tmp_path)
    except DyvteError as e:
        assert isinstance(e, ModelError)
    assert not marker.exists()


def test_a_call_that_says_nothing_is_refused_while_loading(yes):
    """transformers itself makes such calls, for parts of a processor."""
    with nobody_asked(), pytest.raises(ValueError, match="execute"):
        resolve_trust_remote_code(None, "folder", has_local_code=False, has_remote_code=True)


def test_every_call_says_so():
    """Of the classes that may load code of a checkpoint."""
    calls = []
    for file in Path(dyvte_engine.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_pretrained"):
                calls.append((file.name, ast.unparse(node)))
    auto = [call for call in calls if call[1].split(".from_pretrained")[0].split(".")[-1].startswith("Auto")]
    assert len(auto) >= 6
    assert not [call for call in auto if "trust_remote_code=" not in call[1]]
