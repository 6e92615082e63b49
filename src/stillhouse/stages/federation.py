"""Federated training: who takes part, what travels, how the answers become one model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stillhouse.clock import Clock
from stillhouse.errors import ModelError, RecipeError

State = Mapping[str, Any]
Message = Mapping[str, Any]


class Client(Protocol):
    """Who holds data that does not travel."""

    def answer(self, state: State, message: Message, clock: Clock) -> tuple[State, Message]:
        """The next state and the reply; a pure function, so a repeated message is harmless."""
        ...


class Transport(Protocol):
    """What carries a round's message to clients and their replies back."""

    def round(self, number: int, message: Message, clients: Sequence[str]) -> dict[str, Message]:
        """The replies of `clients`, by id and in their order, in round `number`."""
        ...


class InProcess:
    """Clients in this process, asked one after the other.

    A client that has answered a round answers it again with the same reply and keeps its state;
    what it remembers lives as long as this object.

    Args:
        clients: by id; the id, not the place in the list, decides a client's random draws.
        states: their first states, by id.
        seed: of the run.

    Attributes:
        states: after the last round that each client answered.

    Raises:
        RecipeError: clients and states with different ids.
    """

    def __init__(
        self, clients: Mapping[str, Client], states: Mapping[str, State], seed: int
    ) -> None:
        if clients.keys() != states.keys():
            odd = sorted(clients.keys() ^ states.keys())[:3]
            raise RecipeError(f"every client needs one state, and no more: {odd} differ")
        self.clients, self.states, self.seed = dict(clients), dict(states), seed
        self._answered: dict[str, tuple[int, Message]] = {}

    def round(self, number: int, message: Message, clients: Sequence[str]) -> dict[str, Message]:
        """The replies of `clients`, by id and in their order, in round `number`.

        Raises:
            RecipeError: a client that does not exist, told before any is asked.
        """
        unknown = [name for name in clients if name not in self.clients]
        if unknown:
            raise RecipeError(f"no client '{unknown[0]}'; there are {sorted(self.clients)}")
        return {name: self._ask(name, number, message) for name in clients}

    def _ask(self, name: str, number: int, message: Message) -> Message:
        last = self._answered.get(name)
        if last is not None and last[0] == number:
            return last[1]
        clock = Clock(seed=self.seed, path=("client", name), step=number)
        state, reply = self.clients[name].answer(self.states[name], message, clock)
        self.states[name] = state
        self._answered[name] = (number, reply)
        return reply


def selected_rounds(rounds: int, gap: int, updates: int) -> list[int]:
    """Rounds with gradient matching: multiples of `gap` below `gap * updates + 1`.

    There are none when `updates` is 0, where the released condition of FedLGD,
    `a % gap == 0 and a < gap * updates + 1`, would still select round 0. Its clients refresh
    their sets in all of these rounds but round 0.

    Raises:
        RecipeError: a gap below 1, or negative numbers.
    """
    if gap < 1 or rounds < 0 or updates < 0:
        raise RecipeError(f"gap must be 1 at least: gap {gap}, rounds {rounds}, updates {updates}")
    return list(range(0, min(rounds, gap * updates + 1), gap)) if updates else []


@torch.no_grad()
def aggregate(
    server: Mapping[str, Tensor],
    replies: Sequence[Mapping[str, Tensor]],
    *,
    weights: Sequence[float] | None = None,
    keep: Collection[str] = (),
) -> dict[str, Tensor]:
    """The server's weights after a round, a mean over the participants.

    Args:
        server: weights before the round.
        replies: weights of each participant, in a fixed order.
        weights: of the participants, such as their sample counts; none: all equal.
        keep: parts of names that stay as they are on the server; ("bn",) is FedBN.

    Returns:
        New tensors in the dtypes of `server`; counters are those of the first participant.

    Raises:
        ModelError: no replies, or replies with other tensors than the server's.
        RecipeError: weights that do not fit or are not positive.
    """
    if not replies:
        raise ModelError("a round without replies has nothing to aggregate")
    for number, reply in enumerate(replies):
        if reply.keys() != server.keys():
            odd = sorted(reply.keys() ^ server.keys())[:3]
            raise ModelError(f"reply {number} and the server have different tensors: {odd}")
    given = [1.0] * len(replies) if weights is None else list(weights)
    if len(given) != len(replies) or min(given) <= 0:
        raise RecipeError(f"{len(replies)} replies need as many positive weights, got {given}")
    total = sum(given)

    def mean(name: str, old: Tensor) -> Tensor:
        if any(part in name for part in keep):
            return old.clone()
        if not old.is_floating_point():
            return replies[0][name].to(old.device).clone()
        added = sum((w / total) * r[name].to(old) for w, r in zip(given, replies, strict=True))
        return torch.as_tensor(added, dtype=old.dtype, device=old.device)

    return {name: mean(name, old) for name, old in server.items()}


def pseudo_gradient(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], lr: float
) -> dict[str, Tensor]:
    """`(w_old - w_new) / lr` per tensor: the mean gradient, if one step with `lr` was taken.

    Raises:
        RecipeError: a rate that is not above 0.
    """
    if lr <= 0:
        raise RecipeError(f"the rate of a pseudo-gradient must be above 0, not {lr}")
    return {name: (old - after[name]) / lr for name, old in before.items()}
