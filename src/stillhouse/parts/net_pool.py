"""Networks without a training of their own: freshly drawn, or taken from checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from stillhouse.errors import CheckpointError, ModelError

Checkpoint = Path | str | Mapping[str, Tensor]


class NetPool:
    """A source of frozen networks in train mode, each a pure function of a generator.

    Args:
        factory: builds one network; its initialisation may draw from torch's default CPU
            generator (which is set for it and restored after), from nothing else.
        checkpoints: state dicts, or safetensors files of them. Without any, `fresh` gives
            newly initialised networks; with some, one of them is drawn.
        device: where the networks go.

    Raises:
        ModelError: an empty list of checkpoints.
    """

    def __init__(
        self,
        factory: Callable[[], nn.Module],
        checkpoints: Sequence[Checkpoint] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        if checkpoints is not None and not checkpoints:
            raise ModelError("a pool of networks was given an empty list of checkpoints")
        self.factory = factory
        self.checkpoints = checkpoints
        self.device = torch.device(device)

    def fresh(self, generator: Generator) -> nn.Module:
        """A network drawn with `generator`, frozen, in train mode.

        Train mode, so that networks with batch statistics use those of the batch, as the
        released code of distribution matching does.

        Args:
            generator: CPU generator; it moves on. The global random state does not.
        """
        if self.checkpoints is not None:
            return self.load(int(torch.randint(len(self.checkpoints), (), generator=generator)))
        return self._frozen(drawn(self.factory, generator))

    def load(self, index: int) -> nn.Module:
        """The network with the weights of checkpoint `index`, frozen, in train mode.

        Raises:
            CheckpointError: the weights do not fit the network.
        """
        if self.checkpoints is None:
            raise ModelError("this pool of networks has no checkpoints to load")
        found = self.checkpoints[index]
        if not isinstance(found, Mapping):
            from safetensors.torch import load_file

            found = load_file(found)
        net = drawn(self.factory, Generator().manual_seed(0))
        try:
            net.load_state_dict(dict(found))
        except RuntimeError as error:
            raise CheckpointError(f"checkpoint {index} does not fit the network: {error}") from None
        return self._frozen(net)

    def _frozen(self, net: nn.Module) -> nn.Module:
        return net.to(self.device).requires_grad_(False).train()


def drawn(factory: Callable[[], nn.Module], generator: Generator) -> nn.Module:
    """The network `factory` builds when all its draws come from `generator`.

    Built on the CPU, whatever torch's default device is, so that the draws do not depend on
    the hardware. The global random state is left as it was.
    """
    seed = int(torch.randint(0, 2**31 - 1, (), generator=generator))
    outside = torch.default_generator.get_state()
    try:
        torch.default_generator.manual_seed(seed)
        with torch.device("cpu"):
            return factory()
    finally:
        torch.default_generator.set_state(outside)
