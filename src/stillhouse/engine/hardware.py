"""Where a run computes: device, precision, processes. Lightning Fabric does the launching."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import RecipeError, nearest

PRECISIONS = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them
STRATEGIES = ("auto", "flat", "ddp", "fsdp")


class Hardware:
    """The processes of a run and what each computes with.

    On one device in full precision there is no Fabric at all: the loop calls objective and
    optimiser directly. `path` says which way is taken.

    Args:
        accelerator: auto, cpu, cuda, mps ... as Fabric names them.
        devices: processes on this machine.
        nodes: machines.
        strategy: auto or flat (the bare objective, gradients summed in one flat tensor),
            ddp or fsdp (the objective wrapped, for speed or size).
        precision: among `PRECISIONS`.

    Raises:
        RecipeError: an unknown precision or strategy, or an accelerator that is not here.
    """

    def __init__(
        self,
        *,
        accelerator: str = "auto",
        devices: int = 1,
        nodes: int = 1,
        strategy: str = "auto",
        precision: str = "32-true",
    ) -> None:
        if precision not in PRECISIONS:
            raise RecipeError(f"unknown precision '{precision}'{nearest(precision, PRECISIONS)}")
        if strategy not in STRATEGIES:
            raise RecipeError(f"unknown strategy '{strategy}'{nearest(strategy, STRATEGIES)}")
        self.precision = precision
        self.strategy = "flat" if strategy == "auto" else strategy
        self.fabric: Any = None
        self.rank, self.world = 0, 1
        torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if torchrun or devices * nodes > 1:
            self._open_fabric(accelerator, devices, nodes, torchrun)
        else:
            self.device = single_device(accelerator)
        if self.device.type == "cpu":
            keep_freed_memory()

    def _open_fabric(self, accelerator: str, devices: int, nodes: int, torchrun: bool) -> None:
        from lightning_fabric import Fabric

        if torchrun:
            devices = int(os.environ.get("LOCAL_WORLD_SIZE", devices))
            nodes = int(os.environ.get("WORLD_SIZE", devices)) // max(1, devices)
        # Fabric starts the processes and their group; the wrap, if any, is chosen by the loop.
        kind: Any = "ddp" if devices * nodes > 1 else "auto"
        if accelerator == "auto" and not torch.cuda.is_available():
            accelerator = "cpu"
        if accelerator == "cpu" and not torchrun:
            _refuse_crowd(devices)
        self.fabric = Fabric(
            accelerator=accelerator, devices=devices, num_nodes=nodes, strategy=kind
        )
        self.fabric.launch()
        self.rank, self.world = self.fabric.global_rank, self.fabric.world_size
        self.device = self.fabric.device

    @property
    def is_main(self) -> bool:
        """This process writes files and speaks."""
        return self.rank == 0

    @property
    def path(self) -> str:
        """Which way the loop takes, for log and report."""
        if self.world == 1:
            return "direct" if self.precision == "32-true" else f"direct, {self.precision}"
        return f"{self.world} processes, {self.strategy}, {self.precision}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters."""
        return PRECISIONS[self.precision] if self.precision.endswith("-true") else torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, where asked for."""
        if not self.precision.endswith("-mixed"):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=PRECISIONS[self.precision])

    def total(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value

    def same(self, flag: bool) -> bool:
        """True only when it is true on every process."""
        if self.world == 1:
            return flag
        count = torch.tensor([0.0 if flag else 1.0], device=self.device)
        return float(self.total(count)) == 0.0

    def any(self, flag: bool) -> bool:
        """True when it is true on some process."""
        return not self.same(not flag)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            torch.distributed.barrier()

    def first(self, fn: Callable[[], Any]) -> Any:
        """Run `fn` on the first process while the others wait; None elsewhere."""
        result = fn() if self.is_main else None
        self.barrier()
        return result

    def broadcast(self, value: Any) -> Any:
        """A small value of the first process, on all."""
        if self.world == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def describe(self) -> str:
        """The hardware in words, for reports."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"{self.device.type}, {torch.get_num_threads()} threads"
        return f"{name}; {self.path}"


def _refuse_crowd(devices: int) -> None:
    """Refuse more processes than this machine could ever serve: each holds a copy of all.

    Raises:
        RecipeError: more than four for each core, and more than eight.
    """
    cores = os.cpu_count() or 1
    if devices > max(8, 4 * cores):
        raise RecipeError(
            f"hardware.devices: {devices} processes on a machine of {cores} cores; "
            f"{cores} is what it can serve at once"
        )


def keep_freed_memory() -> bool:
    """Let the C library keep up to half a GB that was freed, for the next step.

    By default it hands activations of more than some 100 KB back to the system after each
    layer and has them faulted in, zeroed, at the next: more than half the time of a small
    network's forward. Blocks above 32 MB still go back at once. A setting of the user's own
    (MALLOC_..., GLIBC_TUNABLES, another allocator) is left alone, as is any other C library.

    Returns:
        Whether it was asked to, and agreed.
    """
    own = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if not has_glibc() or any(os.environ.get(name) for name in own):
        return False
    ask = ctypes.CDLL(None).mallopt
    return bool(ask(_TRIM_THRESHOLD, 512 << 20) and ask(_MMAP_THRESHOLD, 32 << 20))


def has_glibc() -> bool:
    """Whether the C library is the one that `keep_freed_memory` can ask."""
    try:
        return "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (AttributeError, OSError, ValueError):
        return False


def single_device(accelerator: str) -> torch.device:
    """The device that an accelerator's name stands for on this machine.

    Raises:
        RecipeError: unknown, or not here.
    """
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    accelerator = {"gpu": "cuda"}.get(accelerator, accelerator)
    if accelerator == "auto":
        accelerator = next(name for name, here in found.items() if here)
    if accelerator not in found:
        raise RecipeError(f"unknown accelerator '{accelerator}'{nearest(accelerator, found)}")
    if not found[accelerator]:
        here = ", ".join(name for name, is_here in found.items() if is_here)
        raise RecipeError(f"the accelerator '{accelerator}' is not here; here are: {here}")
    return torch.device(accelerator)
