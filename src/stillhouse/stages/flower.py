"""Rounds carried by Flower: its grid brings a message to clients and their replies back.

Flower owns the transport, not the run: the same loop over rounds runs in its server app and in
one process, and ends with the same weights. Everything travels as Flower's own records of
arrays and strings; nothing is pickled.

Needs the extra `federated`. Flower is imported when something is sent.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from stillhouse import errors
from stillhouse.engine.checkpoint import put_together, take_apart
from stillhouse.errors import FederationError, MissingExtra, RecipeError, StillhouseError, nearest
from stillhouse.stages.federation import Message

CONTENT, HEADER = "stillhouse.tensors", "stillhouse.header"
ASK, WHO = "train", "query.client"

_NUMPY, _SAFETENSORS = "numpy.ndarray", "safetensors"
# Of Flower's error codes: what a client that is started again may still answer.
_CRASHED, _MOST_CRASHES = 8, 3
_PASSING = {3: "message lost", 4: "reply lost", 5: "node unavailable", _CRASHED: "app crashed"}


def flower() -> Any:
    """The module `flwr.app`.

    Raises:
        MissingExtra: Flower is not installed.
    """
    try:
        import flwr.app as module
    except ImportError as error:
        raise MissingExtra("flwr", "federated", "federated rounds over a network") from error
    return module


# ---- what travels ----------------------------------------------------------------------------


def to_records(message: Message, **header: str | int) -> Any:
    """A message as Flower's RecordDict.

    Args:
        message: tensors of any dtype and shape, numbers, strings, None, and nests of them.
        header: strings and integers that travel beside it.

    Raises:
        CheckpointError: the message holds something else, named by its place.
    """
    app = flower()
    shape, tensors = take_apart(dict(message))
    arrays = app.ArrayRecord({name: _to_array(tensor) for name, tensor in tensors.items()})
    return app.RecordDict({CONTENT: arrays, HEADER: app.ConfigRecord({"shape": shape, **header})})


def from_records(records: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The message and the header that `to_records` was given.

    Raises:
        FederationError: the records are not such a message.
    """
    if HEADER not in records or CONTENT not in records:
        raise FederationError(
            f"this is no message of Stillhouse: it holds {sorted(records)}, not '{HEADER}'"
        )
    header = dict(records[HEADER])
    tensors = {name: _to_tensor(name, array) for name, array in records[CONTENT].items()}
    try:
        message = put_together(str(header.pop("shape")), tensors)
    except (KeyError, ValueError) as error:
        raise FederationError(f"a message of Stillhouse came damaged: {error!r}") from error
    return message, header


def _to_array(tensor: Tensor) -> Any:
    """Flower's own form where numpy has the dtype, so that its mods can read it."""
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    try:
        values = tensor.numpy()
    except TypeError:  # bfloat16 and the eight-bit floats
        data = save_tensors({"tensor": tensor})
        return flower().Array(dtype, shape, _SAFETENSORS, data)
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return flower().Array(dtype, shape, _NUMPY, buffer.getvalue())


def _to_tensor(name: str, array: Any) -> Tensor:
    try:
        if array.stype == _SAFETENSORS:
            tensor = load_tensors(array.data)["tensor"]
        elif array.stype == _NUMPY:
            tensor = torch.from_numpy(np.load(io.BytesIO(array.data), allow_pickle=False))
        else:
            raise ValueError(f"unknown form '{array.stype}'")
    except Exception as error:
        raise FederationError(f"array {name} of a message came damaged: {error}") from error
    if tuple(tensor.shape) != tuple(array.shape):
        raise FederationError(
            f"array {name} of a message has shape {tuple(tensor.shape)}, announced as "
            f"{tuple(array.shape)}"
        )
    return tensor


def error_records(error: StillhouseError) -> Any:
    """What a client replies when it cannot answer for a reason that somebody can mend."""
    app = flower()
    told = {"error": str(error), "kind": type(error).__name__}
    return app.RecordDict({HEADER: app.ConfigRecord(told)})


def _raise_if_error(client: str, records: Any) -> None:
    if HEADER not in records or "error" not in records[HEADER]:
        return
    kind = getattr(errors, str(records[HEADER]["kind"]), FederationError)
    if kind is MissingExtra or not issubclass(kind, StillhouseError):
        kind = FederationError
    raise kind(f"client '{client}': {records[HEADER]['error']}")


# ---- the transport ---------------------------------------------------------------------------


class FlowerTransport:
    """Rounds over a Flower grid (see `federation.Transport`).

    Which node is which client the nodes say themselves, when they are asked: so a client keeps
    its id, and with it its data and random draws, whatever node it comes back as. A simulated
    node, which knows its number only, is the client of that number in `names`.

    Args:
        grid: of the server app.
        names: of all clients, in the fixed order of the method.
        recipe: what clients compare their own recipe with before they answer; see `told_recipe`.
        timeout: seconds within which an exchange is answered by all; also how long is waited for
            clients that are not there yet.
        pause: seconds between two looks for replies, at most.

    Attributes:
        nodes: client to Flower's id of its node, as last seen.
        spare: nodes that are no client of this run.

    Raises:
        RecipeError: times that are not above 0.
    """

    def __init__(
        self,
        grid: Any,
        names: Sequence[str],
        *,
        recipe: str = "",
        timeout: float = 3600.0,
        pause: float = 1.0,
    ) -> None:
        if timeout <= 0 or pause <= 0:
            raise RecipeError(f"timeout and pause must be above 0, not {timeout} and {pause}")
        self.grid, self.names, self.recipe = grid, list(names), recipe
        self.timeout, self.pause = float(timeout), float(pause)
        self.nodes: dict[str, int] = {}
        self.spare: set[int] = set()
        self._greeted: dict[str, int] = {}
        self._crashes: dict[str, int] = {}

    def round(self, number: int, message: Message, clients: Sequence[str]) -> dict[str, Message]:
        """The replies of `clients`, by id and in their order, in exchange `number`.

        A client whose node goes away is asked again where it comes back.

        Raises:
            RecipeError: a client that does not exist, told before any is asked.
            FederationError: a client is not there, or does not answer, within the timeout.
            StillhouseError: a client says why it cannot answer.
        """
        for name in clients:
            if name not in self.names:
                raise RecipeError(f"no client '{name}'{nearest(name, self.names)}")
        until, wait = time.monotonic() + self.timeout, _Pauses(self.pause)
        records, troubles = to_records(message), dict[str, str]()
        self._crashes.clear()
        replies: dict[str, Message] = {}
        missing = list(clients)
        while missing:
            self._find(missing, until, troubles)
            letters = {name: self._letter(records, number, name) for name in missing}
            for name, found in self._exchange(letters, until, troubles).items():
                replies[name] = self._opened(name, number, found)
            missing = [name for name in clients if name not in replies]
            if missing:
                wait()
        return {name: replies[name] for name in clients}

    def _letter(self, records: Any, number: int, client: str) -> Any:
        app = flower()
        told = {"exchange": number, "client": client, "recipe": self.recipe}
        header = app.ConfigRecord({**records[HEADER], **told})
        content = app.RecordDict({CONTENT: records[CONTENT], HEADER: header})
        return app.Message(content, self.nodes[client], ASK, ttl=self.timeout, group_id=str(number))

    def _opened(self, client: str, number: int, records: Any) -> Message:
        _raise_if_error(client, records)
        reply, header = from_records(records)
        told = (header.get("exchange"), header.get("client"))
        if told != (number, client):
            raise FederationError(
                f"client '{client}' was asked exchange {number} and replied to exchange "
                f"{told[0]} as '{told[1]}'"
            )
        return reply

    # ---- who is there --------------------------------------------------------------------

    def _find(self, clients: Sequence[str], until: float, troubles: Mapping[str, str]) -> None:
        """Learn the nodes of `clients`; wait for those that are not there yet."""
        wait, heard = _Pauses(self.pause), dict[str, int]()
        while True:
            present = set(self.grid.get_node_ids())
            self.nodes = {name: node for name, node in self.nodes.items() if node in present}
            if any(name not in self.nodes for name in clients):
                self._greet(present - self.spare - {*self.nodes.values(), *self._greeted.values()})
                self._hear(heard)
            absent = [name for name in clients if name not in self.nodes]
            if not absent:
                return
            if time.monotonic() >= until:
                raise FederationError(self._absence(absent, len(present), troubles))
            wait()

    def _greet(self, strangers: Iterable[int]) -> None:
        """Ask nodes who they are; a dead one that is still listed holds up nobody."""
        app = flower()
        for node in sorted(strangers):
            number = self._push(app.Message(app.RecordDict(), node, WHO, ttl=self.timeout))
            if number is not None:
                self._greeted[number] = node

    def _hear(self, heard: dict[str, int]) -> None:
        """Note who has said who it is.

        Who speaks now is believed before a node that did earlier: that one may be dead and listed
        still. Two that speak at one search are two.
        """
        if not self._greeted:
            return
        for reply in self.grid.pull_messages(list(self._greeted)):
            node = self._greeted.pop(reply.metadata.reply_to_message_id, None)
            if node is None:
                continue
            if reply.has_error():
                self._trouble(f"at node {node}", reply.error, {})
                continue
            _raise_if_error(f"at node {node}", reply.content)
            name = self._named(dict(reply.content[HEADER]))
            if name is None:
                self.spare.add(node)
            elif heard.setdefault(name, node) == node:
                self.nodes[name] = node
            else:
                raise FederationError(
                    f"two nodes say that they are client '{name}'; give every SuperNode its own: "
                    f"--node-config 'client=\"NAME\"'"
                )

    def _named(self, header: dict[str, Any]) -> str | None:
        """Which client a node is by what it says of itself; None: none of this run."""
        if "client" in header:
            name = str(header["client"])
            return name if name in self.names else None
        part, parts = int(header["part"]), int(header["parts"])
        if parts < len(self.names):
            raise RecipeError(
                f"{parts} simulated SuperNodes are too few for {len(self.names)} clients: "
                f"flwr run --federation-config 'num-supernodes={len(self.names)}'"
            )
        return self.names[part] if part < len(self.names) else None

    def _absence(self, absent: list[str], nodes: int, troubles: Mapping[str, str]) -> str:
        first = absent[0]
        why = f" ({troubles[first]})" if first in troubles else ""
        others = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        known = ", ".join(f"'{name}'" for name in self.nodes) or "none of this run"
        return (
            f"client '{first}'{others} did not come within {self.timeout:g} s{why}; of {nodes} "
            f"connected nodes are clients: {known}. Start what is missing (flower-supernode "
            f"--node-config 'client=\"{first}\"') and run the same command again: nothing that "
            "was answered is computed again"
        )

    # ---- there and back ------------------------------------------------------------------

    def _push(self, letter: Any) -> str | None:
        """Send one message, so that there is no doubt which one was refused."""
        numbers = list(self.grid.push_messages([letter]))
        return str(numbers[0]) if numbers and numbers[0] else None

    def _exchange(
        self, letters: Mapping[str, Any], until: float, troubles: dict[str, str]
    ) -> dict[str, Any]:
        """Send and receive: by client, the content of those replies that came.

        Args:
            letters: Flower's messages by client.
            until: when to give up.
            troubles: gets, by client, why its reply did not come this time.

        Raises:
            FederationError: a client app failed, or the time is over.
        """
        waiting: dict[str, str] = {}
        for name, letter in letters.items():
            number = self._push(letter)
            if number is not None:
                waiting[number] = name
            else:
                self._lost(name, "Flower did not take its message", troubles)
        found: dict[str, Any] = {}
        wait = _Pauses(self.pause)
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                name = waiting.pop(reply.metadata.reply_to_message_id, "")
                if not name:
                    continue
                if reply.has_error():
                    self._trouble(name, reply.error, troubles)
                else:
                    found[name] = reply.content
            if waiting and time.monotonic() >= until:
                raise FederationError(self._silence(list(waiting.values())))
            if waiting:
                wait()
        return found

    def _trouble(self, client: str, error: Any, troubles: dict[str, str]) -> None:
        if error.code not in _PASSING:
            raise FederationError(
                f"the client app of '{client}' failed (Flower's code {error.code}): {error.reason}"
            )
        if error.code == _CRASHED:
            self._crashes[client] = self._crashes.get(client, 0) + 1
            if self._crashes[client] >= _MOST_CRASHES:
                raise FederationError(
                    f"the client app of '{client}' crashed {_MOST_CRASHES} times at the same "
                    "exchange, such as for lack of memory; its SuperNode's log says more"
                )
        self._lost(client, _PASSING[error.code], troubles)

    def _lost(self, client: str, why: str, troubles: dict[str, str]) -> None:
        """Forget where a client was; it may come back at another node."""
        troubles[client] = why
        self.nodes.pop(client, None)

    def _silence(self, names: list[str]) -> str:
        return (
            f"no reply within {self.timeout:g} s from {', '.join(repr(n) for n in names)}; give "
            "clients more time (run config `timeout`), or run the same command again: what was "
            "answered is not computed again"
        )


class _Pauses:
    """Short pauses that grow, so that a fast round is not slowed and a slow one not disturbed."""

    def __init__(self, most: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self.most, self.next, self.sleep = most, 0.02, sleep

    def __call__(self) -> None:
        self.sleep(min(self.next, self.most))
        self.next *= 1.5
