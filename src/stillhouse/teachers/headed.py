"""A live teacher whose features lie in a store: only its last linear layer is computed anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stillhouse.batch import Batch
from stillhouse.net import Net
from stillhouse.teacher import Knowledge, Want
from stillhouse.teachers.live import Live
from stillhouse.teachers.stored import Stored

FEATURES = Want("tap:head:input")


class Headed(Live):
    """Logits and inputs of the head from a store; everything else from the module itself.

    Whoever wants nothing else of the stored samples is answered without running the body of
    the network, which is nearly all of it.

    Args:
        net: the teacher's net; frozen in place.
        stored: the inputs of its head, taken from this very body.
    """

    def __init__(self, net: Net, stored: Stored) -> None:
        super().__init__(net)
        self.stored = stored
        self._spares = False

    def bind(self, wants: Sequence[Want], task: Any) -> None:
        """As a live teacher; the store serves when nothing but the head's ends is wanted."""
        super().bind(wants, task)
        self._spares = bool(wants) and {want.within for want in wants} <= {Want("logits"), FEATURES}
        if self._spares:
            views = dict.fromkeys(want.view for want in wants)
            self.stored.bind([FEATURES._replace(view=view) for view in views], task)

    def knowledge(self, batch: Batch) -> Knowledge:
        """What was asked for in `bind`."""
        if not self._spares:
            return super().knowledge(batch)
        kept = self.stored.knowledge(batch)
        streams = list(dict.fromkeys(want.stream for want in self._wants))
        if streams == [""]:
            return self._headed(kept)
        return Knowledge.of_streams({name: self._headed(kept.stream(name)) for name in streams})

    def _headed(self, kept: Knowledge) -> Knowledge:
        head = self.net.head_layer()
        features = kept.tensor(FEATURES.key).to(head.weight.dtype)
        with torch.no_grad():
            logits = head(features)
        return Knowledge({"logits": logits, FEATURES.key: features}, kept.valid)
