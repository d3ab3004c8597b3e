"""What was built, what this machine has, and what of it works: `python -m dyvte_engine.commands.doctor [--json]`.

Every part is tried, not guessed, and for each that does not work the reason is given in a sentence. Nothing here
raises: the report is also there when the native library, torch or transformers is missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .guard import guarded

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = (
    "torch", "transformers", "numpy", "tokenizers", "safetensors", "pillow",
    "flash-attn", "flash-attn-3", "flash-attn-4", "accelerate",
)  # fmt: skip
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")

Report = dict[str, Any]


def collect() -> Report:
    """The whole report as plain JSON types; `report["usable"]` says whether the engine can run here."""
    native, torch_ok = _native(), _try(lambda: importlib.import_module("torch"))
    transformers_ok = _try(lambda: importlib.import_module("transformers"))
    report: Report = {
        "python": {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()},
        "source_commit": _source_commit(),
        "packages": {name: _version(name) for name in ("dyvte-engine", *PACKAGES)},
        "native": native,
        "cpu": _cpu(),
        "gpu": _gpu(),
        "attention": _attention(),
        "packed_weights": _packed_weights(),
    }
    sdpa = next(a["reason"] for a in report["attention"] if a["name"] in ("sdpa", "all"))  # the CPU's comes first
    named = {
        "torch": torch_ok,
        "transformers": transformers_ok,
        "native library": native["reason"],
        "kernels on the CPU": native["runs"].get("cpu"),
        "attention on the CPU": sdpa,
    }
    report["problems"] = [f"{name}: {reason}" for name, reason in named.items() if reason]
    report["usable"] = not report["problems"]
    return report


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _try(call: Callable[[], Any]) -> str | None:
    """Runs `call`; None if it went well, else the reason in one sentence."""
    try:
        call()
    except Exception as error:  # a doctor reports any failure and never fails itself
        return _sentence(error)
    return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _source_commit() -> str | None:
    """Commit of the source tree that this package runs from, "-dirty" if files differ; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    return _output_of("git", "-C", str(root), "describe", "--always", "--dirty") if (root / ".git").exists() else None


def _native() -> Report:
    """{"build": its own account or None, "reason": why it does not load or None, "runs": {device: reason or None}}."""
    native: Report = {"build": None, "reason": None, "runs": {}}
    try:
        importlib.import_module("torch")
        ops = importlib.import_module("dyvte_engine.kernels.ops")
        ops.load_library()
        native["build"] = ops.build_info()
    except Exception as error:
        native["reason"] = _sentence(error)
        return native
    native["runs"]["cpu"] = _try(lambda: _run_kernel("cpu"))
    native["runs"]["cuda"] = _why_no_cuda(native["build"]) or _try(lambda: _run_kernel("cuda"))
    return native


def _why_no_cuda(build: Report) -> str | None:
    if not build.get("cuda"):
        return f"the library holds no CUDA kernels: {build.get('cuda_reason')}"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _run_kernel(device: str) -> None:
    """One real kernel on `device`, checked against its plain torch form."""
    import torch

    from dyvte_engine.kernels import ops

    x, weight = torch.randn(3, 64, device=device), torch.ones(64, device=device)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), ops.rms_norm_ref(x, weight, 1e-5))


def _cpu() -> Report:
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        pairs = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in pairs}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    report: Report = {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "features": [name for name in CPU_FEATURES if name in flags],
    }
    try:
        import torch

        report["torch_threads"] = torch.get_num_threads()
        report["torch_capability"] = torch.backends.cpu.get_cpu_capability()
    except Exception as error:
        report["torch_capability"] = _sentence(error)
    return report


def _gpu() -> Report:
    """{"devices": [{name, capability, memory_gib}], "driver": version or None, "reason": why there is none or None}."""
    driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    report: Report = {"devices": [], "driver": driver and driver.splitlines()[0], "reason": None}
    try:
        import torch

        if not torch.cuda.is_available():
            built = (torch.version.cuda and f"built for CUDA {torch.version.cuda}") or "a build without CUDA"
            report["reason"] = f"torch {torch.__version__} ({built}) finds no CUDA device"
            return report
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            capability, memory = f"{device.major}.{device.minor}", round(device.total_memory / 2**30, 1)
            report["devices"].append({"name": device.name, "capability": capability, "memory_gib": memory})
    except Exception as error:
        report["reason"] = _sentence(error)
    return report


def _attention() -> list[Report]:
    """One record for each backend and device: {"name", "device", "reason"}; a reason of None means that it works."""
    try:
        import torch

        from dyvte_engine.kernels import attention
    except Exception as error:
        return [{"name": "all", "device": "cpu", "reason": _sentence(error)}]
    gpu = torch.cuda.is_available()
    devices = [("cuda", torch.bfloat16)] if gpu else []
    records = [
        {"name": name, "device": device, "reason": attention.try_backend(name, torch.device(device), dtype)}
        for device, dtype in [("cpu", torch.float32), *devices]
        for name in attention.BACKENDS
    ]
    for name, call in (("torch_flash with seqused_k", _flash_seqused), ("torch varlen_attn with pages", _varlen_paged)):
        reason = _try(call) if gpu else "runs on CUDA devices only, and torch finds none"
        records.append({"name": name, "device": "cuda", "reason": reason})
    return records


def _packed_weights() -> dict[str, str | None]:
    """For each dtype why a CPU's linear layers cannot have packed weights; None: they can."""
    try:
        import torch

        from dyvte_engine.models.linear import packing_fault
    except Exception as error:
        return {"all": _sentence(error)}
    return {name: packing_fault(getattr(torch, name)) for name in ("float32", "bfloat16", "float16")}


def _flash_seqused() -> None:
    """FlashAttention-2 in torch over a contiguous cache whose lengths are on the device."""
    import torch

    q, k = (torch.randn(rows, 2, 64, device="cuda", dtype=torch.bfloat16) for rows in (1, 8))
    cu_q, cu_k = (torch.tensor([0, n], device="cuda", dtype=torch.int32) for n in (1, 8))
    used = torch.tensor([5], device="cuda", dtype=torch.int32)
    out = torch.ops.aten._flash_attention_forward(q, k, k, cu_q, cu_k, 1, 8, 0.0, False, False, seqused_k=used)[0]
    _compare_with_sdpa(out, q, k[:5])


def _varlen_paged() -> None:
    """torch's variable-length attention over 256-row pages (torch 2.12 and later)."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    q, pages = (torch.randn(*size, 2, 64, device="cuda", dtype=torch.bfloat16) for size in ((1,), (2, 256)))
    cu_q, used = (torch.tensor(values, device="cuda", dtype=torch.int32) for values in ([0, 1], [5]))
    table = torch.tensor([[1, 0]], device="cuda", dtype=torch.int32)
    out = varlen_attn(q, pages, pages, cu_q, None, 1, 512, seqused_k=used, block_table=table)
    assert isinstance(out, torch.Tensor)
    _compare_with_sdpa(out, q, pages[1, :5])


def _compare_with_sdpa(out: Tensor, q: Tensor, kv: Tensor) -> None:
    """Raises AssertionError unless `out` [1, H, D] is the attention of `q` [1, H, D] over `kv` [n, H, D] as K and V."""
    import torch

    q, kv = q.transpose(0, 1), kv.transpose(0, 1)
    want = torch.nn.functional.scaled_dot_product_attention(q, kv, kv).transpose(0, 1)
    torch.testing.assert_close(out, want, atol=3e-2, rtol=3e-2)


def _rows(report: Report) -> list[tuple[str, str, str]]:
    """The report as (section, what, finding) lines."""
    python, native, cpu, gpu = report["python"], report["native"], report["cpu"], report["gpu"]
    rows = [("python", python["version"], f"{python['executable']} on {python['platform']}")]
    rows.append(("source tree", "commit", report["source_commit"] or "none: an installed package"))
    rows += [("packages", name, version or "not installed") for name, version in report["packages"].items()]
    if native["reason"]:
        rows.append(("native library", "does not load", native["reason"]))
    rows += [("native library", key, str(value)) for key, value in (native["build"] or {}).items() if value != ""]
    rows += [("kernels", device, reason or "work") for device, reason in native["runs"].items()]
    threads = f"{cpu['cores']} cores, {cpu.get('torch_threads', '?')} torch threads, {cpu['torch_capability']}"
    rows.append(("cpu", cpu["model"], f"{threads}; {' '.join(cpu['features'])}"))
    for device in gpu["devices"]:
        size = f"compute capability {device['capability']}, {device['memory_gib']} GiB, driver {gpu['driver']}"
        rows.append(("gpu", device["name"], size))
    if gpu["reason"]:
        rows.append(("gpu", "none", f"{gpu['reason']}; driver: {gpu['driver'] or 'none found'}"))
    rows += [(f"attention ({a['device']})", a["name"], a["reason"] or "works") for a in report["attention"]]
    rows += [("packed weights", dtype, reason or "work") for dtype, reason in report["packed_weights"].items()]
    return rows


def _verdict(report: Report) -> str:
    if report["usable"]:
        return "The engine can run here."
    return "The engine cannot run here. " + "; ".join(report["problems"])


def show(report: Report) -> None:
    """Prints the report as a table, or as plain lines where rich is not installed."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        print("\n".join(f"{section}: {what}: {finding}" for section, what, finding in _rows(report)))
        print(_verdict(report))
        return
    table = Table(title="dyvte_engine doctor", show_header=False, title_justify="left")
    section = None
    for row in _rows(report):
        if section not in (None, row[0]):
            table.add_section()
        table.add_row(row[0] if row[0] != section else "", escape(row[1]), escape(row[2]))
        section = row[0]
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(_verdict(report), style="green" if report["usable"] else "bold red", markup=False)


def run(as_json: bool = False) -> int:
    """Prints the report; returns 0 if the engine can run here, else 1."""
    report = collect()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0 if report["usable"] else 1


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if unknown := [argument for argument in given if argument != "--json"]:
        print(f"doctor: unknown argument {unknown[0]!r}; accepted: --json", file=sys.stderr)
        return 2
    return run("--json" in given)


if __name__ == "__main__":
    guarded(lambda: sys.exit(main()))
