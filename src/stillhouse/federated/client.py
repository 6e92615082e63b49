"""The client app: says who it is, and answers exchanges with its own data and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp

from stillhouse.engine.job import locked
from stillhouse.errors import FederationError, StillhouseError
from stillhouse.federated.settings import Settings, check_recipe
from stillhouse.launch import federated_client
from stillhouse.recipe import Recipe, dump_recipe
from stillhouse.stages.federation import Message, Remembering
from stillhouse.stages.flower import (
    HEADER,
    error_records,
    flower,
    from_records,
    to_records,
)
from stillhouse.writing import file_name

# A process that is asked again has its data open still; memories are read from disk each time.
_OPEN: dict[tuple[str, str, str], Remembering] = {}
_MOST_OPEN = 8


def who(message: Any, context: Any) -> Any:
    """Say which client this node is: by name, or by its number in a simulation."""
    records = flower()
    told = _identity(dict(context.node_config))
    content = records.RecordDict({HEADER: records.ConfigRecord(told)})
    return records.Message(content, reply_to=message)


def answer(message: Any, context: Any) -> Any:
    """Answer an exchange; what can be mended is told to the server in words."""
    try:
        content = _answered(message.content, context)
    except StillhouseError as error:
        content = error_records(error)
    return flower().Message(content, reply_to=message)


def _answered(records: Any, context: Any) -> Any:
    asked, header = from_records(records)
    name, number = str(header["client"]), int(header["exchange"])
    own = context.node_config.get("client")
    if own is not None and str(own) != name:
        raise FederationError(f"this node is client '{own}' and was asked as '{name}'")
    settings = Settings.of(context.run_config, context.node_config)
    recipe = settings.opened()
    check_recipe(str(header["recipe"]), recipe)
    place = settings.memory_folder() / file_name(str(asked.get("run", ""))) / file_name(name)
    reply = _reply(recipe, name, place, number, asked)
    return to_records(reply, exchange=number, client=name)


def _reply(recipe: Recipe, name: str, place: Path, number: int, asked: Message) -> Message:
    # A message that comes again while the first is being answered waits, and finds the memory.
    with locked(place / "client.lock", wait=True):
        key = (dump_recipe(recipe), name, str(place))
        if key not in _OPEN:
            while len(_OPEN) >= _MOST_OPEN:
                del _OPEN[next(iter(_OPEN))]
            _OPEN[key] = federated_client(recipe, name, place)
        return _OPEN[key].answer(number, asked)


def _identity(node_config: dict[str, Any]) -> dict[str, str | int]:
    if "client" in node_config:
        return {"client": str(node_config["client"])}
    if {"partition-id", "num-partitions"} <= node_config.keys():
        return {
            "part": int(node_config["partition-id"]),
            "parts": int(node_config["num-partitions"]),
        }
    told = "this SuperNode is no client: start it with --node-config 'client=\"NAME\"'"
    return {"error": told, "kind": FederationError.__name__}


app = ClientApp()
app.query("client")(who)
app.train()(answer)
