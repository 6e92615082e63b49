"""Sharded training (FSDP): parameters, gradients and optimiser state spread over processes.

What is saved and restored is the full state, the same on disk as without sharding, so a run
may go on with another number of processes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from stillhouse.engine.hardware import Hardware
from stillhouse.errors import RecipeError
from stillhouse.objective import Objective

_FULL = StateDictOptions(full_state_dict=True)


def sharded(objective: Objective, hardware: Hardware) -> Objective:
    """A copy of the objective whose parameters are shards; the original is left as it is.

    Blocks of the student with parameters of their own become units, then the student, then
    the objective. Queues, prototypes and other buffers stay whole on every process.

    Raises:
        RecipeError: this build of torch cannot shard on this device.
    """
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise RecipeError("strategy fsdp needs torch 2.6 or newer") from error
    copied = copy.deepcopy(objective).to(hardware.device)
    mesh = init_device_mesh(hardware.device.type, (hardware.world,))
    student = getattr(copied, "student", None)
    if isinstance(student, nn.Module):
        for block in _blocks(student):
            fully_shard(block, mesh=mesh)
        fully_shard(student, mesh=mesh)
    fully_shard(copied, mesh=mesh)
    return copied


def _blocks(student: nn.Module) -> list[nn.Module]:
    """Entries of the student's lists of layers, where its memory is."""
    return [
        block
        for module in student.modules()
        if isinstance(module, nn.ModuleList)
        for block in module
        if any(True for _ in block.parameters())
    ]


def full_state(objective: nn.Module) -> dict[str, Any]:
    """The whole state on every process; all of them must call this."""
    return dict(get_model_state_dict(objective, options=_FULL))


def load_full_state(objective: nn.Module, state: dict[str, Any]) -> None:
    """Spread a whole state over the processes."""
    set_model_state_dict(objective, state, options=_FULL)


def full_optimizer_state(objective: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The whole state of an optimiser, by parameter name."""
    return dict(get_optimizer_state_dict(objective, optimizer, options=_FULL))


def load_full_optimizer_state(
    objective: nn.Module, optimizer: Optimizer, state: dict[str, Any]
) -> None:
    """Spread an optimiser's whole state over the processes."""
    set_optimizer_state_dict(objective, optimizer, state, options=_FULL)


def is_sharded(module: nn.Module) -> bool:
    """Whether its parameters are shards."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in module.parameters())


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor in full, gathered when it is a shard."""
    full = getattr(value, "full_tensor", None)
    return full() if full is not None else value
