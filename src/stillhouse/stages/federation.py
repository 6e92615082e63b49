"""Federated training: who takes part, what travels, how the answers become one model.

What a transport (in this process, Flower, ...) and a method agree on:

- `Client.answer(state, message, clock) -> (state, reply)` is a pure function. The first state
  is `{}`. States, messages and replies are flat mappings of strings to tensors, numbers,
  booleans and strings; weights are told as `w/NAME` (`packed`, `unpacked`).
- `Remembering(name, client, seed, folder).answer(number, message) -> reply` is a client with its
  memory: what it keeps under (run, client, exchange) makes a repeated message harmless, also in
  a process that was killed and begun again.
- `Transport.round(number, message, clients) -> {client: reply}` carries one exchange. The server's
  code sends through `Server.ask`, which adds `run` and `after/CLIENT` to the message; a transport
  hands the message on as it is, and a client's side calls `Remembering.answer`.
- `FederatedMethod.clients(job)` are the names, `FederatedMethod.client(job, name)` builds one from
  a job; both are functions of the recipe alone, so that
  `stillhouse.launch.federated_client(recipe, name, folder) -> Remembering` builds the same client
  in any process (its own data only, where the data set can be opened for one client).
- `FederatedMethod.transport(job)` is `InProcess`, unless the run was given another:
  `stillhouse.launch.run(recipe, given=Given(connect=connect))` with `connect(job) -> Transport`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from stillhouse._version import __version__
from stillhouse.clock import Clock
from stillhouse.engine.checkpoint import read_state, write_state
from stillhouse.engine.job import Job
from stillhouse.errors import CheckpointError, ModelError, RecipeError, nearest
from stillhouse.method import Method
from stillhouse.writing import file_name

State = Mapping[str, Any]
Message = Mapping[str, Any]
Connect = Callable[[Job], "Transport"]

_FIRST = -1  # the exchange before the first


class Client(Protocol):
    """Who holds data that does not travel."""

    def answer(self, state: State, message: Message, clock: Clock) -> tuple[State, Message]:
        """The next state and the reply; a pure function, so a repeated message is harmless."""
        ...


class Transport(Protocol):
    """What carries an exchange's message to clients and their replies back."""

    def round(self, number: int, message: Message, clients: Sequence[str]) -> dict[str, Message]:
        """The replies of `clients`, by id and in their order, in exchange `number`."""
        ...


class Remembering:
    """A client and what it remembers: states and replies of its last two exchanges.

    A message says by `after/NAME` which exchange its answer follows. The same exchange after the
    same one in the same `run` is answered from memory, which is what a server that was killed, or
    fell back to the checkpoint before, asks for. The first exchange is kept too, so that rounds
    can be run anew without it.

    Args:
        name: of the client; with the run's seed and the exchange's number it decides all draws.
        client: who answers.
        seed: of the run.
        folder: where the memory lies; None: it lives as long as this object.
    """

    def __init__(self, name: str, client: Client, seed: int, folder: Path | None = None) -> None:
        self.name, self.client, self.seed, self.folder = name, client, seed, folder
        self._kept: dict[int, dict[str, Any]] = {}

    def answer(self, number: int, message: Message) -> Message:
        """The reply to a message, from memory where it was given before.

        Raises:
            CheckpointError: the exchange it follows is no longer remembered.
        """
        run, after = str(message.get("run", "")), int(message.get(f"after/{self.name}", _FIRST))
        found = self._read(number)
        if found is not None and (found["run"], found["after"]) == (run, after):
            reply: Message = found["reply"]
            return reply
        state: State = {} if after == _FIRST else self._state_after(after, run, number)
        clock = Clock(seed=self.seed, path=("client", self.name), step=number)
        state, reply = self.client.answer(state, message, clock)
        self._write(
            number, {"run": run, "after": after, "state": dict(state), "reply": dict(reply)}
        )
        self._forget(number, after)
        return reply

    @property
    def state(self) -> State:
        """The state after the last exchange that was answered; empty before the first."""
        known = self._known()
        last = self._read(max(known)) if known else None
        return {} if last is None else last["state"]

    def _state_after(self, after: int, run: str, number: int) -> State:
        found = self._read(after)
        if found is None or found["run"] != run:
            raise CheckpointError(
                f"the client '{self.name}' is asked for exchange {number} after {after}, which it "
                f"does not remember (it has {sorted(self._known())}, perhaps of another run); "
                "begin the federation anew with --redo introduction"
            )
        state: State = found["state"]
        return state

    def _known(self) -> list[int]:
        if self.folder is None:
            return list(self._kept)
        return [int(path.stem.partition("-")[2]) for path in self.folder.glob("exchange-*.state")]

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"exchange-{number:06d}.state"

    def _read(self, number: int) -> dict[str, Any] | None:
        if self.folder is None:
            return self._kept.get(number)
        if not self._path(number).exists():
            return None
        with contextlib.suppress(CheckpointError):  # a damaged memory is none: it answers anew
            found: dict[str, Any] = read_state(self._path(number))
            return found
        return None

    def _write(self, number: int, kept: dict[str, Any]) -> None:
        if self.folder is None:
            self._kept[number] = kept
        else:
            write_state(self._path(number), kept)

    def _forget(self, number: int, after: int) -> None:
        """Keep this exchange, the one before it and the first; later ones were of another past."""
        for known in self._known():
            if known in {number, after, 0}:
                continue
            if self.folder is None:
                del self._kept[known]
            else:
                self._path(known).unlink(missing_ok=True)


class InProcess:
    """Clients in this process, asked one after the other.

    Args:
        clients: by id; the id, not the place in the list, decides a client's random draws.
        seed: of the run.
        folder: where their memories lie, a folder each; None: in memory.
    """

    def __init__(
        self, clients: Mapping[str, Client], seed: int, folder: Path | None = None
    ) -> None:
        self.clients = {
            name: Remembering(
                name, client, seed, None if folder is None else folder / file_name(name)
            )
            for name, client in clients.items()
        }

    @property
    def states(self) -> dict[str, State]:
        """The clients' states after the last exchange that each of them answered."""
        return {name: client.state for name, client in self.clients.items()}

    def round(self, number: int, message: Message, clients: Sequence[str]) -> dict[str, Message]:
        """The replies of `clients`, by id and in their order, in exchange `number`.

        Raises:
            RecipeError: a client that does not exist, told before any is asked.
        """
        unknown = [name for name in clients if name not in self.clients]
        if unknown:
            raise RecipeError(
                f"no client '{unknown[0]}'; there are {sorted(self.clients)}"
                f"{nearest(unknown[0], self.clients)}"
            )
        return {name: self.clients[name].answer(number, message) for name in clients}


class Server:
    """What the server knows between two exchanges; all of it is saved after every round.

    Args:
        weights: of the model before the first round.
        run: stands for the run in the clients' memories; see `run_token`.

    Attributes:
        before: weights before the last aggregation; they are `after` until the first.
        after: weights now.
        held: what else a method keeps, such as images; tensors, numbers, strings.
        answered: client to the last exchange it answered.
        exchange: number of the next exchange.
        log: one flat record per exchange: `bytes_down`, `bytes_up`, `seconds` and what the
            method adds.
    """

    def __init__(self, weights: Mapping[str, Tensor], run: str = "") -> None:
        self.run = run
        self.before = {name: value.detach().clone() for name, value in weights.items()}
        self.after = dict(self.before)
        self.held: dict[str, Any] = {}
        self.answered: dict[str, int] = {}
        self.exchange = 0
        self.log: list[dict[str, Any]] = []

    def ask(
        self, transport: Transport, message: Message, clients: Sequence[str]
    ) -> dict[str, Message]:
        """One exchange: the replies of `clients` in their order, with its cost in the log.

        Raises:
            ModelError: a client that was asked and did not reply.
        """
        began, number = time.perf_counter(), self.exchange
        after = {f"after/{name}": self.answered.get(name, _FIRST) for name in clients}
        sent = {**message, "run": self.run, **after}
        replies = transport.round(number, sent, clients)
        silent = [name for name in clients if name not in replies]
        if silent:
            raise ModelError(f"the client '{silent[0]}' did not reply in exchange {number}")
        self.answered.update(dict.fromkeys(clients, number))
        self.exchange += 1
        self.log.append(
            {
                "exchange": number,
                "clients": ", ".join(clients),
                "bytes_down": bytes_of(message) * len(clients),
                "bytes_up": sum(bytes_of(replies[name]) for name in clients),
                "seconds": time.perf_counter() - began,
            }
        )
        return {name: replies[name] for name in clients}

    def move(self, weights: Mapping[str, Tensor]) -> None:
        """Take new weights; the present ones are kept as `before`."""
        self.before, self.after = self.after, dict(weights)

    def state_dict(self) -> dict[str, Any]:
        """Everything."""
        names = ("run", "before", "after", "held", "answered", "exchange", "log")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was saved."""
        for name, value in state.items():
            setattr(self, name, value)


class FederatedMethod(Method):
    """A method whose data lie with clients; it says who they are and how one is built.

    Both are functions of the recipe alone, so that any process can build any client.
    """

    def clients(self, job: Job) -> list[str]:
        """Ids of all clients, in a fixed order: what the data set says in `about["clients"]`.

        Raises:
            RecipeError: the data is not divided among clients.
        """
        named = job.task.about.get("clients")
        if not named:
            raise RecipeError(
                f"'{self.card.id}' needs data that is divided among clients, and "
                f"'{job.splits.edition}' is not: use data: {{name: clients, options: {{clients: "
                "{a: {name: ...}, b: {name: ...}}}}}, or digit_clients"
            )
        return [str(name) for name in named]

    def client(self, job: Job, name: str) -> Client:
        """The client of this id.

        Args:
            job: of the run, or of the process in which the client lives; its data may be those
                of this client only.
            name: of the client.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define client")

    def transport(self, job: Job) -> Transport:
        """What carries the rounds: what the run was given, else clients in this process."""
        given = getattr(job.models, "given", None)
        connect: Connect | None = getattr(given, "connect", None)
        if connect is not None:
            return connect(job)
        clients = {name: self.client(job, name) for name in self.clients(job)}
        return InProcess(clients, job.seed, job.folder.joinpath("clients", *job.path))


def run_token(recipe: Any) -> str:
    """What stands for a run in the memory of its clients: a hash of all that decides it."""
    told = recipe.model_dump(mode="json", exclude={"output", "compare", "seeds"})
    text = json.dumps([__version__, told], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def packed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as entries `prefix/NAME` of a message, on the CPU and apart from the model."""
    return {f"{prefix}/{name}": value.detach().cpu().clone() for name, value in tensors.items()}


def unpacked(prefix: str, message: Message) -> dict[str, Tensor]:
    """The tensors that `packed` told under this prefix."""
    start = f"{prefix}/"
    return {k.removeprefix(start): v for k, v in message.items() if k.startswith(start)}


def bytes_of(message: Message) -> int:
    """Bytes of what a message tells: its tensors, 8 per number, texts as UTF-8; no framing."""

    def size(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        return len(value.encode()) if isinstance(value, str) else 8

    return sum(size(value) for value in message.values())


def participants(clients: Sequence[str], share: float, generator: Generator) -> list[str]:
    """Who takes part in a round: `share` of the clients at random, one at least, in their order.

    Raises:
        RecipeError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise RecipeError(f"the share of clients in a round must be in (0, 1], not {share}")
    count = max(1, round(share * len(clients)))
    if count == len(clients):
        return list(clients)
    chosen = torch.randperm(len(clients), generator=generator)[:count].sort().values
    return [clients[number] for number in chosen.tolist()]


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
