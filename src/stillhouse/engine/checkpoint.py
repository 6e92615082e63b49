"""State on disk: written atomically, hashed, rotated, verified when read.

A file is a header line, the sha256 of what follows, and a safetensors payload whose
metadata holds the shape of the nested state. It contains tensors, numbers, strings,
booleans, None, and lists, tuples and mappings of them: never a pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from stillhouse.errors import CheckpointError
from stillhouse.writing import write_atomic as write_atomic

_MAGIC = b"stillhouse-state-1\n"


def pack(state: Any) -> bytes:
    """Encode a nested state; the inverse of `unpack`.

    Raises:
        CheckpointError: it holds a value of a kind that is not kept.
    """
    shape, tensors = take_apart(state)
    payload = save_tensors(tensors, {"shape": shape})
    return _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload


def unpack(data: bytes, where: str = "state") -> Any:
    """Decode what `pack` made.

    Raises:
        CheckpointError: cut off, changed, or of another format.
    """
    head = len(_MAGIC) + 65
    if not data.startswith(_MAGIC) or len(data) < head:
        raise CheckpointError(f"{where} is not a state file, or its beginning is damaged")
    payload = data[head:]
    if hashlib.sha256(payload).hexdigest().encode() != data[len(_MAGIC) : head - 1]:
        raise CheckpointError(f"{where} is damaged: its content does not match its hash")
    tensors = load_tensors(payload)
    length = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + length])
    return put_together(header["__metadata__"]["shape"], tensors)


def take_apart(state: Any) -> tuple[str, dict[str, Tensor]]:
    """A nested state as JSON that says its shape, and its tensors: plain, on the CPU, unshared.

    Raises:
        CheckpointError: it holds a value of a kind that is not kept.
    """
    tensors: dict[str, Tensor] = {}
    shape = _encode(state, tensors, set(), "state")
    return json.dumps(shape), tensors


def put_together(shape: str, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `take_apart`; tensors are copied."""
    return _decode(json.loads(shape), tensors)


def _encode(value: Any, tensors: dict[str, Tensor], seen: set[int], where: str) -> Any:
    if isinstance(value, Tensor):
        # A parameter may be sharded or on an accelerator: what is kept is a plain CPU copy.
        kept = value.detach().cpu().contiguous()
        if kept.numel() and kept.data_ptr() in seen:
            kept = kept.clone()
        seen.add(kept.data_ptr())
        name = str(len(tensors))
        tensors[name] = kept
        return {"t": name}
    if value is None or isinstance(value, (bool, int, str)):
        return {"v": value}
    if isinstance(value, float):
        return {"f": value.hex()}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, tensors, seen, f"{where}[{i}]") for i, v in enumerate(value)]
        return {"l" if isinstance(value, list) else "u": items}
    if isinstance(value, dict):
        pairs = []
        for key, entry in value.items():
            if not isinstance(key, (str, int)):
                raise CheckpointError(f"a state's key must be a string or integer: {where}.{key}")
            pairs.append([key, _encode(entry, tensors, seen, f"{where}.{key}")])
        return {"d": pairs}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}; a state holds tensors, numbers, strings, None, "
        "and lists, tuples and mappings of them"
    )


def _decode(shape: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, value),) = shape.items()
    if kind == "t":
        # A copy of its own: views into the file's bytes lie at odd addresses, where kernels may
        # add in another order, and a resumed run would differ in the last bit.
        return tensors[value].clone()
    if kind == "v":
        return value
    if kind == "f":
        return float.fromhex(value)
    if kind == "l":
        return [_decode(v, tensors) for v in value]
    if kind == "u":
        return tuple(_decode(v, tensors) for v in value)
    return {key: _decode(v, tensors) for key, v in value}


def write_state(path: Path, state: Any, *, synced: bool = True) -> None:
    """Pack and write a state atomically; see `write_atomic` for `synced`."""
    write_atomic(path, pack(state), synced=synced)


def read_state(path: Path) -> Any:
    """Read and verify a state.

    Raises:
        CheckpointError: absent or damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return unpack(data, str(path))


class Rotation:
    """The checkpoints of one stage: the newest `keep` of them, older ones removed.

    Args:
        folder: where they lie.
        keep: how many to keep; at least 2, so that a damaged one can be fallen back from.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = max(2, keep)

    def files(self) -> list[Path]:
        """From the oldest to the newest."""
        return sorted(self.folder.glob("step-*.state"))

    def save(self, step: int, state: Any) -> Path:
        """Write a checkpoint, then remove those that are too old."""
        path = self.folder / f"step-{step:012d}.state"
        write_state(path, state)
        for old in self.files()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def latest(self) -> tuple[Any, list[str]]:
        """The newest state that is whole (None without one) and what was wrong with newer ones.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.
        """
        troubles: list[str] = []
        files = self.files()
        for path in reversed(files):
            try:
                return read_state(path), troubles
            except CheckpointError as error:
                troubles.append(str(error))
        if troubles:
            raise CheckpointError(
                "every checkpoint of this stage is damaged: "
                + "; ".join(troubles)
                + f". Remove {self.folder} to begin the stage anew"
            )
        return None, troubles

    def clear(self) -> None:
        """Remove all checkpoints: the stage has finished."""
        for path in self.files():
            path.unlink(missing_ok=True)


def load_in_place(target: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Load a module's state strictly, with a message that names what does not fit.

    Raises:
        CheckpointError: keys or shapes differ.
    """
    try:
        target.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"the saved state does not fit the model: {error}") from error
