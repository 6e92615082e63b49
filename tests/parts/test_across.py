from __future__ import annotations

import torch

from stillhouse.clock import Clock
from stillhouse.parts.across import whole_batch


def test_alone_the_batch_is_whole():
    x = torch.rand(5, 2)
    assert whole_batch(x, 5, Clock()) is x


def test_blocks_of_different_size_come_in_the_order_of_the_batch(monkeypatch):
    """Seven rows over three processes, as the loop cuts them; the collective is replayed."""
    whole = torch.arange(14.0).view(7, 2)
    blocks = [whole[7 * r // 3 : 7 * (r + 1) // 3] for r in range(3)]
    largest = max(len(b) for b in blocks)

    def all_gather(found, padded):
        assert padded.shape == (largest, 2)
        for slot, block in zip(found, blocks, strict=True):
            slot.zero_()
            slot[: len(block)] = block

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    for rank, block in enumerate(blocks):
        assert torch.equal(whole_batch(block, 7, Clock(rank=rank, world=3)), whole)
