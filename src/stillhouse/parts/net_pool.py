"""Networks without a training of their own: freshly drawn, from checkpoints, or between two."""

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
        starts: the weights each checkpoint's training began with, for `blend`.
        device: where the networks go.

    Raises:
        ModelError: an empty list of checkpoints, or not one start for each.
    """

    def __init__(
        self,
        factory: Callable[[], nn.Module],
        checkpoints: Sequence[Checkpoint] | None = None,
        *,
        starts: Sequence[Checkpoint] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if checkpoints is not None and not checkpoints:
            raise ModelError("a pool of networks was given an empty list of checkpoints")
        if starts is not None and len(starts) != len(checkpoints or ()):
            raise ModelError(
                f"a pool of networks needs one start for each of its {len(checkpoints or ())} "
                f"checkpoints, got {len(starts)}"
            )
        self.factory = factory
        self.starts = starts
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
        return self._with(read_weights(self.checkpoints[index]), f"checkpoint {index}")

    def __len__(self) -> int:
        """Number of checkpoints."""
        return len(self.checkpoints or ())

    def blend(self, index: int, share: float) -> nn.Module:
        """A network between the start and the end of a training, frozen, in eval mode.

        `share * start + (1 - share) * end`, one share for all parameters (Wang et al., NCFM,
        CVPR 2025): features that separate classes, and yet differ from draw to draw. Running
        statistics are blended too, so that a batch-norm network is between the two as a
        whole; it is in eval mode, since the batches it sees are of single classes. Counters
        are those of the end.

        Args:
            index: of the checkpoint.
            share: of the start, in [0, 1]; 0 gives the trained network, 1 the untrained.

        Raises:
            ModelError: no starts, or a share outside [0, 1].
            CheckpointError: the weights do not fit the network or each other.
        """
        if self.checkpoints is None or self.starts is None:
            raise ModelError("blending needs a pool with checkpoints and the starts of each")
        if not 0.0 <= share <= 1.0:
            raise ModelError(f"the share of the start must lie in [0, 1], not {share}")
        start, end = read_weights(self.starts[index]), read_weights(self.checkpoints[index])
        if start.keys() != end.keys():
            raise CheckpointError(
                f"start and end of network {index} have different tensors: "
                f"{sorted(start.keys() ^ end.keys())[:3]}"
            )
        mixed = {
            name: share * start[name] + (1.0 - share) * value
            if value.is_floating_point() and share > 0.0
            else value
            for name, value in end.items()
        }
        return self._with(mixed, f"start and end of network {index}").eval()

    def _with(self, weights: Mapping[str, Tensor], what: str) -> nn.Module:
        net = drawn(self.factory, Generator().manual_seed(0))
        try:
            net.load_state_dict(dict(weights))
        except RuntimeError as error:
            raise CheckpointError(f"{what} does not fit the network: {error}") from None
        return self._frozen(net)

    def _frozen(self, net: nn.Module) -> nn.Module:
        return net.to(self.device).requires_grad_(False).train()


def read_weights(found: Checkpoint) -> Mapping[str, Tensor]:
    """The weights of a checkpoint by name; a file is read.

    Raises:
        CheckpointError: a file that is missing or damaged.
    """
    if isinstance(found, Mapping):
        return found
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(found)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the weights '{found}' cannot be read: {error}") from None


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
