"""The documents against the code: what one of the recipes in CONTRIBUTING.md forgot, dead links, names that moved."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

import dyvte_engine
from dyvte_engine import policies
from dyvte_engine.assets import SMOL, heads_of
from dyvte_engine.commands.main import app
from dyvte_engine.kernels import ops
from dyvte_engine.models.families import FAMILIES, REFUSED
from dyvte_engine.policies.notation import POLICIES
from dyvte_engine.runtime import options
from tests.families import table
from tests.policies import shared

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "dyvte_engine").rglob("*.md")]
MADE = {  # by commands
    "benchmarks.md",
    "families.md",
    "nano-curve.md",
    "nano-tasks.md",
    "smol-curve.md",
    "report.md",
    "tables.md",
}
WRITTEN = [page for page in PAGES if page.name not in MADE and page.parent != DOCS / "benchmarks"]
PROGRAMS = (".py", ".cpp", ".h", ".cu", ".cuh")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
each_written = pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))


def text(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text()


def imported(path: Path) -> dict[str, str]:
    """name -> module of every relative import in a file, in whatever branch."""
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level)
    return {name.name: node.module or "" for node in nodes for name in node.names}


def test_the_public_names_agree():
    found = imported(Path(dyvte_engine.__file__))
    found.pop("find")  # of `lazy`
    assert found == dyvte_engine._HOMES
    assert sorted(dyvte_engine.__all__) == sorted(found)
    assert all(hasattr(dyvte_engine, name) for name in dyvte_engine.__all__)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_exported_documented_and_tested(name):
    kind = getattr(POLICIES[name].make, "__self__", POLICIES[name].make)  # the class of `DynamicExit.from_file`
    assert kind.__name__ in policies.__all__
    assert kind.__name__ in dyvte_engine.__all__
    rows = [line for line in text("docs", "policies.md").splitlines() if line.startswith(f"| `{kind.__name__}(")]
    assert [f"`{name}" in row.split(" | ")[1] for row in rows] == [True]
    assert any(type(policy) is kind for policy, _ in shared.POLICIES.values())


def test_every_public_name_is_in_the_reference():
    pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)}
    paths = {"EXAMPLES", "NANO", "NANO_HEADS", "hf"}  # paths; a module whose names have their own entries
    errors = {name for name, home in dyvte_engine._HOMES.items() if home == "errors"}  # one entry for their module
    assert "errors" in shown and set(dyvte_engine.__all__) - paths - errors <= shown
    assert {"generate", "enable", "disable", "create_app"} <= shown


def test_the_example_of_the_front_page_says_what_it_says():
    code, said = re.search(r"```python\n(.*?)```\n\nprints \"(.*?)\"", text("README.md"), re.DOTALL).groups()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert ran.stdout == f"{said}\n"


def test_what_smols_pages_say_of_its_files():
    page, report = text("docs", "smol.md"), json.loads((SMOL / "report.json").read_text())
    rows = re.findall(r"^\| [^|]+ \| ([\d,]+) \| (\d+ % .*)\| (\d+ % .*)\| (\d+) % \|$", page, re.MULTILINE)
    said = sorted(tuple(map(int, re.findall(r"\d+", " ".join(row).replace(",", "")))) for row in rows)
    found = [parts for by in ("held out", "kinds") for parts in report[by].values()]
    shares = [
        [d["all"]["share"], *d["all"]["ci95"], d["unseen style"]["share"], *d["unseen style"]["ci95"]] for d in found
    ]
    blind = [d["blind"]["share"] for d in found]
    made = [(d["all"]["n"], *(round(100 * x) for x in (*s, b))) for d, s, b in zip(found, shares, blind, strict=True)]
    assert said == sorted(made)

    with safe_open(heads_of("smol"), "pt") as file:
        stored = json.loads(file.metadata()["dyvte_exit_heads"])["calibration"]
    promises = re.findall(r"^\| (\d+) %[^|]* \| ([\d.]+)[^|]* \| (\d+) % \|$", page, re.MULTILINE)
    assert len(promises) == 4
    for stay, layer, flops in promises:
        last = next(i for i, changed in enumerate(stored["limit"]) if changed > 1 - int(stay) / 100) - 1
        assert (layer, flops) == (f"{stored['mean_layer'][last]:.1f}", f"{100 * stored['flops'][last]:.0f}")

    digests = dict(
        re.findall(r"^\| `(\w+\.safetensors)` .* ([0-9a-f]{64}) \|$", (SMOL / "README.md").read_text(), re.M)
    )
    assert digests == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in SMOL.glob("*.safetensors")}
    assert report["trained"] == digests["trained.safetensors"]


def test_the_site_has_every_page():
    """What MkDocs would only notice when the site is built (`make docs`)."""
    nav = text("mkdocs.yml")
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md") if page.parent != DOCS / "benchmarks"}
    assert sorted(page for page in pages - {"benchmarks.md"} if page not in nav) == []


def test_every_policy_has_a_notation():
    kinds = {getattr(policies, name) for name in policies.__all__ if isinstance(getattr(policies, name), type)}
    made = {getattr(n.make, "__self__", n.make) for n in POLICIES.values()}
    bases = {policies.VisualTokenPolicy, policies.Composed}
    assert {kind for kind in kinds if issubclass(kind, policies.VisualTokenPolicy)} - bases == made


def test_families_are_in_their_page():
    page = text("docs", "families.md")
    header = next(line for line in page.splitlines() if line.startswith("| feature |"))
    assert [cell.strip() for cell in header.strip("|").split("|")][1:] == list(FAMILIES)
    for name, why in REFUSED.items():
        assert f"- `{name}`: {why}." in page
    head = re.escape(table.HEAD).replace(r"\{torch\}", r"[\d.]+").replace(r"\{transformers\}", r"[\d.]+")
    assert re.match(head, page) and page.endswith(table.TAIL)


OPS = re.findall(r'm\.def\(\s*"(?!tape_)(\w+)\(', text("python_bindings", "ops.cpp"))


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_a_twin_a_fake_kernel_and_tests(op):
    public = op.replace("_into_", "_")  # takes `out`
    assert {public, f"{public.rstrip('_')}_ref"} <= set(ops.__all__)
    assert f'register_fake("dyvte::{op}")' in text("dyvte_engine", "kernels", "ops.py")
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "ops").glob("test_*.py"))
    assert f"ops.{public.rstrip('_')}_ref(" in tests
    assert re.search(rf"ops\.dyvte\.{op}\b|\"{op}\"", tests)  # opcheck


HEADERS = "".join(path.read_text() for path in (ROOT / "csrc" / "include" / "dyvte").iterdir())
KERNELS = sorted(set(re.findall(r"Status (\w+)_(?:cpu|cuda)\(", HEADERS)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_sanitised_and_measured(kernel):
    assert re.search(rf"with\.{kernel}\b|\b{kernel}_cuda\(", text("csrc", "tests", "kernels.cpp"))
    assert re.search(rf"ops\.\w*{kernel}_?\(", text("benchmarks", "kernel_cases.py"))


def test_every_generation_option_is_in_its_page():
    served, refused = text("docs", "sampling.md").split("## Refused")
    assert [name for name in options._SERVED if f"`{name}`" not in served] == []
    assert [name for name in options._REFUSED if f"`{name}`" not in refused] == []


def test_every_command_is_in_a_page():
    pages = "".join(page.read_text() for page in WRITTEN)
    names = [c.name or c.callback.__name__ for c in app.registered_commands]
    assert [name for name in names if f"dyvte-engine {name}" not in pages] == []


@each_page
def test_relative_links_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [link.partition("#")[0] for link in links if not re.match(r"\w+:", link)]
    assert [link for link in local if link and not (page.parent / link).exists()] == []


@each_written
def test_files_that_a_page_names_exist(page):
    files = [f"/{path.relative_to(ROOT)}" for room in ROOT.iterdir() if room.name[0] != "." for path in _programs(room)]
    named = re.findall(r"`([\w./-]+)`", page.read_text())
    gone = [name for name in named if name.endswith(PROGRAMS) and not any(f.endswith(f"/{name}") for f in files)]
    assert gone == []


def _programs(room: Path) -> list[Path]:
    found = [room] if room.is_file() else room.rglob("*")
    return [path for path in found if path.suffix in PROGRAMS]


@each_written
def test_python_in_a_page_is_valid_and_its_imports_are_there(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dyvte_engine"):
                module = __import__(node.module, fromlist=["_"])
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@each_written
def test_text_is_wrapped(page):
    """At 100 columns, but for tables, code, and what cannot be broken."""
    prose = re.sub(r"```.*?```|<!-- (\w+): begin -->.*<!-- \1: end -->", "", page.read_text(), flags=re.DOTALL)
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "    "))]
    assert [line for line in lines if len(line) > 100 and " " in line.strip()[:100]] == []


def test_the_front_page_is_short():
    assert len(text("README.md").splitlines()) <= 110
