"""AdamW with fp32 master weights behind a low-precision model, warm-up and cosine decay, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from ..files import write_bytes


class MasterAdamW:
    """Steps fp32 copies of `parameters` and writes them back in the parameters' own dtype.

    Gradients are clipped to norm 1; weight decay acts on matrices only. Parameters whose name begins with a key of
    `scales` learn at that share of the rate. The whole state is a dict of tensors.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        lr: float,
        total_steps: int,
        warmup: int,
        weight_decay: float = 0.05,
        scales: Mapping[str, float] = MappingProxyType({}),
    ):
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.masters = {name: p.detach().float().clone().requires_grad_() for name, p in self.parameters.items()}
        groups: dict[tuple[float, float], list[torch.Tensor]] = {}
        for name, master in self.masters.items():
            scale = next((share for start, share in scales.items() if name.startswith(start)), 1.0)
            key = (weight_decay if master.ndim > 1 else 0.0, scale)
            groups.setdefault(key, []).append(master)
        self.adam = torch.optim.AdamW(
            [{"params": group, "weight_decay": decay, "scale": scale} for (decay, scale), group in groups.items()],
            lr=lr,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.lr, self.total_steps, self.warmup, self.steps_done = lr, total_steps, warmup, 0

    def rate(self) -> float:
        """Learning rate of the coming step."""
        if self.steps_done < self.warmup:
            return self.lr * (self.steps_done + 1) / self.warmup
        share = (self.steps_done - self.warmup) / max(1, self.total_steps - self.warmup)
        return self.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))

    def step(self) -> None:
        for name, parameter in self.parameters.items():
            self.masters[name].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        if dist.is_initialized():
            average_over_workers([m.grad for m in self.masters.values() if m.grad is not None])
        torch.nn.utils.clip_grad_norm_([m for m in self.masters.values() if m.grad is not None], 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.rate() * group["scale"]
        self.adam.step()
        self.steps_done += 1
        self._write_back()

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])

    def save(self, path: str | Path) -> None:
        """Writes masters, both moments and the step number; replaces an older file only when complete."""
        tensors = {"steps_done": torch.tensor(self.steps_done)}
        for name, master in self.masters.items():
            tensors["master/" + name] = master.detach()
            for key, value in self.adam.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
        write_bytes(path, save(tensors))

    def load(self, path: str | Path) -> None:
        """Continues from `save`: same parameters in, same next step out."""
        with safe_open(path, "pt") as file:
            self.steps_done = int(file.get_tensor("steps_done"))
            stored = set(file.keys())
            for name, master in self.masters.items():
                master.data.copy_(file.get_tensor("master/" + name))
                if "exp_avg/" + name in stored:
                    self.adam.state[master] = {
                        key: file.get_tensor(f"{key}/{name}").to(master.device)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
        self._write_back()


def average_over_workers(gradients: list[torch.Tensor]) -> None:
    """Replaces each gradient by its mean over the workers of a `torchrun`, in one exchange."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / dist.get_world_size()).split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


class Progress:
    """Prints one line every `every` steps: step, running means, pictures a second and the time left."""

    def __init__(self, total: int, done: int, every: int, per_step: int):
        self.total, self.first, self.every, self.per_step = total, done, every, per_step
        self.start = time.monotonic()
        self.values: dict[str, list[float]] = {}

    def __call__(self, step: int, **values: float | torch.Tensor) -> None:
        for key, value in values.items():
            self.values.setdefault(key, []).append(float(value))
        if step % self.every and step != self.total:
            return
        speed = (step - self.first) / (time.monotonic() - self.start)
        means = " ".join(f"{key} {sum(seen) / len(seen):.4f}" for key, seen in self.values.items())
        left = (self.total - step) / speed / 60
        print(
            f"step {step}/{self.total} {means} | {speed * self.per_step:.1f} pictures/s, {left:.1f} min left",
            flush=True,
        )
        self.values = {}
