"""What a model costs: parameters, bytes, multiply-adds, latency, throughput, memory."""

from __future__ import annotations

import math
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stillhouse.batch import RowView
from stillhouse.errors import ModelError
from stillhouse.net import Net

MB = 1024 * 1024


def parameters(module: nn.Module) -> int:
    """Number of parameters; shared ones count once, buffers do not count."""
    return sum(p.numel() for p in {id(p): p for p in module.parameters()}.values())


def state_bytes(module: nn.Module) -> int:
    """Bytes of the tensors a checkpoint holds: parameters and persistent buffers, shared once."""
    kept: dict[tuple[str, int, tuple[int, ...]], int] = {}
    for value in module.state_dict().values():
        if isinstance(value, Tensor) and value.device.type != "meta":
            where = (str(value.device), value.data_ptr(), tuple(value.shape))
            kept[where] = value.numel() * value.element_size()
    return sum(kept.values())


def bytes_on_disk(path: Path | str) -> int:
    """Size of a file, or of all files below a folder.

    Raises:
        ModelError: nothing lies there.
    """
    place = Path(path)
    if place.is_file():
        return place.stat().st_size
    if place.is_dir():
        return sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
    raise ModelError(f"no file or folder '{place}' whose size could be taken")


def macs(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Multiply-adds of one call, as the sum over the matrix products and convolutions in it.

    Half of what PyTorch's flop counter counts. Fused kernels without a formula (attention,
    recurrent layers on CPU and GPU) are replaced by the plain ones while counting.
    Element-wise work, and products inside custom kernels, are not counted.

    Args:
        module: called in eval mode without gradient; its mode is restored.
        args: one call's arguments, with the batch whose cost is asked for.
        kwargs: named ones.

    Returns:
        The count for the whole batch that is given.
    """
    from torch.backends import cudnn, mha, mkldnn
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    weighted = torch.ops.aten._embedding_bag_forward_only, torch.ops.aten._embedding_bag
    counter = FlopCounterMode(
        display=False, custom_mapping=dict.fromkeys(weighted, _weighted_sum_flops)
    )
    fast = mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(mha.set_fastpath_enabled, fast)
        mha.set_fastpath_enabled(False)
        stack.enter_context(_judging(module))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(mkldnn.flags(enabled=False))
        stack.enter_context(cudnn.flags(enabled=False))
        with counter:
            module(*args, **kwargs)
    return int(counter.get_total_flops()) // 2


def _weighted_sum_flops(
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    *_: Any,
    **__: Any,
) -> int:
    """Of a sparse matrix times a dense one, which is a bag of weighted rows; plain bags have none.

    Tensors come as their shapes.
    """
    if per_sample_weights is None:
        return 0
    return 2 * int(math.prod(indices)) * int(weight[1])


@contextmanager
def _judging(*modules: nn.Module) -> Iterator[None]:
    modes = [[(part, part.training) for part in module.modules()] for module in modules]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for parts in modes:
            for part, training in parts:
                part.training = training


def rows_of(view: Any, count: int) -> Any:
    """A view of `count` rows, made of the rows of `view` over and over.

    Args:
        view: a tensor (B, ...), a list of B, or a mapping of such.
        count: rows wanted, >= 1.

    Raises:
        ModelError: the view has no rows.
    """
    if isinstance(view, Tensor):
        if view.ndim == 0 or len(view) == 0:
            raise ModelError("a view without rows cannot be measured")
        index = torch.arange(count, device=view.device) % len(view)
        return view.index_select(0, index).contiguous()
    if isinstance(view, RowView) and len(view):
        return view.select(torch.arange(count) % len(view))
    if isinstance(view, Mapping):
        return {key: rows_of(value, count) for key, value in view.items()}
    if isinstance(view, (list, tuple)) and view:
        return [view[i % len(view)] for i in range(count)]
    raise ModelError(f"a view of type {type(view).__name__} cannot be measured")


def synchronise(device: torch.device | str) -> None:
    """Wait until the device has done what it was told; nothing to wait for on a CPU."""
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).synchronize()


def timings(
    calls: Sequence[Callable[[], Any]],
    device: torch.device | str,
    *,
    seconds: float = 1.0,
    warm: int = 3,
    least: int = 10,
    most: int = 200,
) -> list[list[float]]:
    """Milliseconds of repeated calls, the contestants interleaved.

    Interleaving gives background load to all alike; single runs one after the other were
    seen to differ three- to eightfold by load alone.

    Args:
        calls: what to time; each runs once a round.
        device: synchronised before each clock reading.
        seconds: about how long to go on in all.
        warm: untimed rounds first (lazy initialisation, caches).
        least: rounds at least.
        most: rounds at most.

    Returns:
        For each of `calls` its times in the order measured.
    """
    for _ in range(warm):
        for call in calls:
            call()
    synchronise(device)
    taken: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    for round_ in range(most):
        if round_ >= least and time.perf_counter() - began > seconds:
            break
        for call, own in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            synchronise(device)
            own.append((time.perf_counter() - start) * 1000)
    return taken


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lies, interpolated linearly.

    Raises:
        ModelError: no values.
    """
    if not values:
        raise ModelError("no values to take a percentile of")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def measure(
    models: Mapping[str, tuple[nn.Module, Any]],
    *,
    batches: Sequence[int] = (1, 32),
    seconds: float = 1.0,
    disk: Mapping[str, Path | str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Size and speed of several models, measured side by side on the device they are on.

    Args:
        models: name to (module, view). The module is called with the view as `Net` calls
            its module: a mapping as keyword arguments, anything else as one argument; a
            `Net` takes the view itself. Preprocessing before the view is not in the time.
        batches: numbers of rows to time.
        seconds: time for each batch size, over all models.
        disk: name to the file or folder that holds the model; without it `bytes` is that
            of the tensors of its state.

    Returns:
        By name: `parameters`; `bytes`; `macs` of one row; `latency_ms` by batch size, as
        {"p50", "p95"}; `throughput` in rows a second at the largest batch (from p50).

    Raises:
        ModelError: models on different devices, or a view without rows.
    """
    devices = {_device(module) for module, _ in models.values()}
    if len(devices) > 1:
        raise ModelError(f"models on different devices are not comparable: {sorted(devices)}")
    device = devices.pop() if devices else "cpu"
    found: dict[str, dict[str, Any]] = {}
    for name, (module, view) in models.items():
        place = (disk or {}).get(name)
        found[name] = {
            "parameters": parameters(module),
            "bytes": state_bytes(module) if place is None else bytes_on_disk(place),
            "macs": _macs_of_row(module, view),
            "latency_ms": {},
        }
    with _judging(*(module for module, _ in models.values())):
        for count in batches:
            calls = [_call(module, rows_of(view, count)) for module, view in models.values()]
            for name, times in zip(models, timings(calls, device, seconds=seconds), strict=True):
                p50, p95 = percentile(times, 0.5), percentile(times, 0.95)
                found[name]["latency_ms"][str(count)] = {"p50": p50, "p95": p95}
                found[name]["throughput"] = count / p50 * 1000
    return found


def _device(module: nn.Module) -> str:
    for tensor in (*module.parameters(), *module.buffers()):
        return str(tensor.device)
    return "cpu"


def _call(module: nn.Module, view: Any) -> Callable[[], Any]:
    # A Net takes a mapping as one view and spreads it itself.
    if isinstance(view, Mapping) and not isinstance(module, Net):
        return lambda: module(**view)
    return lambda: module(view)


def _macs_of_row(module: nn.Module, view: Any) -> int | None:
    one = rows_of(view, 1)
    try:
        if isinstance(one, Mapping) and not isinstance(module, Net):
            return macs(module, **one)
        return macs(module, one)
    except (NotImplementedError, RuntimeError):
        # An operator without a plain form (quantised, custom): unknown, not zero.
        return None


def peak_memory_mb(device: torch.device | str = "cpu") -> float | None:
    """Highest memory so far in MiB: of the process on a CPU, of torch on an accelerator.

    A process's peak never goes down: measure contestants in one process each. None where
    the system does not tell.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / MB
    if kind == "xpu":
        return float(torch.xpu.max_memory_allocated(device)) / MB
    if kind != "cpu":
        return None
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MB if sys.platform == "darwin" else peak / 1024


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made inside the block that are alive at the same time.

    On a CPU the process's own peak never goes down and holds whatever ran before; this is the
    memory of one piece of work: activations, gradients, temporaries between operations. What
    lies inside a kernel, and what was alive before, is not counted. Every operation becomes
    slower, so time is taken apart.

    Attributes:
        now: bytes alive.
        peak: most bytes alive so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and look at what it returns."""
        kwargs = kwargs or {}
        before = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        for value in tree_leaves(out):
            # Views, and what is changed in place, live in storage that is there already.
            if isinstance(value, Tensor) and self._key(value) not in before | self._seen:
                self._enter(value)
        return out

    @staticmethod
    def _key(value: Tensor) -> int:
        return int(value.untyped_storage()._cdata)

    def _enter(self, value: Tensor) -> None:
        storage, key = value.untyped_storage(), self._key(value)
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def reset_peak_memory(device: torch.device | str) -> None:
    """Begin a new peak where that is possible: on CUDA and XPU, not for a process."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif kind == "xpu":
        torch.xpu.reset_peak_memory_stats(device)
