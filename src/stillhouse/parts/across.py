"""What must be seen of the whole batch when several processes hold a part each."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.clock import Clock


def whole_batch(own: Tensor, of: int, clock: Clock) -> Tensor:
    """The rows of all processes in the global order, without gradient to the others' rows.

    Args:
        own: (B, ...), this process's contiguous block, as the loop cuts it.
        of: rows of the global batch.
        clock: says which process this is among how many.

    Returns:
        (of, ...); `own` itself in a single process.
    """
    if clock.world == 1:
        return own
    ends = [of * (rank + 1) // clock.world for rank in range(clock.world)]
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    # Blocks differ by a row at most; the collective wants them equal.
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: len(own)] = own.detach()
    found = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(found, padded)
    return torch.cat([block[:size] for block, size in zip(found, sizes, strict=True)])
