"""A pool of trained networks with the weights they began with: made once, shared, resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from stillhouse.engine.job import Job
from stillhouse.net import Net
from stillhouse.parts.distilled_set import Preprocessing
from stillhouse.parts.net_pool import NetPool, read_weights
from stillhouse.stages.judge_distilled_set import Protocol, train_on

PREFIX = "module."


def trained_pool(
    job: Job,
    make: Callable[[], Net],
    count: int,
    protocol: Protocol,
    preprocessing: Preprocessing | None,
    *,
    name: str = "pool",
    share: Mapping[str, Any] | None = None,
) -> NetPool:
    """Networks trained on the training split from different initial weights.

    Each is a stage of its own under `name`, so that a killed run loses part of one network.
    With `share` they lie in the cache: sides of a comparison, and later runs on the same data
    by the same seed, train nothing.

    Args:
        job: of the run.
        make: builds one network with fresh weights.
        count: how many.
        protocol: of their training.
        preprocessing: of the split's images, which are in [0, 1].
        name: of the stages.
        share: what the networks depend on besides data, protocol and seed.

    Returns:
        A pool with `starts`; its networks are numbered in the order of training.
    """
    starts, ends = [], []
    source = job.splits["train"]
    for number in range(count):
        child = job.child(name, number)
        net = child.build(make, "net")
        assert isinstance(net, Net)
        starts.append(weights_of(net))
        key = None
        if share is not None:
            key = {
                **share,
                "what": f"{name} net {number}",
                "protocol": asdict(protocol),
                "preprocessing": repr(preprocessing),
                "data": source.fingerprint,
                "seed": job.seed,
            }
        train_on(child, net, source, protocol, preprocessing=preprocessing, share=key, kind="train")
        ends.append(weights_of(net))
    return NetPool(make, ends, starts=starts, device=job.device)


def read_pool(
    files: Sequence[tuple[Path | str, Path | str]], make: Callable[[], Net], device: Any
) -> NetPool:
    """A pool of networks that were trained elsewhere.

    Args:
        files: for each network the safetensors files of its initial and its final weights, by
            the names of the module itself.
        make: builds one network.
        device: where they go.

    Raises:
        CheckpointError: a file that cannot be read, or does not fit the network.
    """

    def read(path: Path | str) -> dict[str, Tensor]:
        found = read_weights(path)
        own = all(k.startswith(PREFIX) for k in found)
        return dict(found) if own else {PREFIX + k: v for k, v in found.items()}

    starts, ends = zip(*((read(start), read(end)) for start, end in files), strict=True)
    pool = NetPool(make, ends, starts=starts, device=device)
    for number in range(len(pool)):
        pool.blend(number, 0.5)  # tells now, not in the middle of a run, what does not fit
    return pool


def weights_of(net: Net) -> dict[str, Tensor]:
    """A copy of a network's state: the live tensors would go on moving with its training."""
    return {name: value.detach().clone() for name, value in net.state_dict().items()}
