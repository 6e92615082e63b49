"""Data divided among clients: any registered data sets side by side, one for each client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from stillhouse.batch import Joined, Source, Splits, carve
from stillhouse.clock import generator
from stillhouse.data.data_set import DataSet
from stillhouse.data.options import DataOptions
from stillhouse.data.registry import load_data, open_data
from stillhouse.errors import DataError, RecipeError, nearest

_VAL = 0.1


class ClientData(BaseModel):
    """What one client holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        description="a registered data set (image_folder, mnist5k, ...) or package.module:function"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="of that data set: its folder, size, augmentation ..."
    )


class ClientsOptions(DataOptions):
    """Options of data divided among clients."""

    clients: dict[str, ClientData] = Field(
        min_length=1, description="client to its data set, each with options of its own"
    )
    mean: list[float] | None = Field(
        None, description="per channel, by which every client's images are normalised; none: 0.5"
    )
    std: list[float] | None = Field(None, description="likewise; none: 0.5")
    val: Literal[0] = Field(0, description="not used here: see client_val")
    client_val: int | float | None = Field(
        None,
        description="rows (integer) or share (below 1) of each client's training rows that are "
        "carved off for validation by the run's seed, 0 for none; none: as each data set says",
    )


class Clients(DataSet[ClientsOptions]):
    """Several data sets with the same classes and one size of image, one for each client.

    The splits are those of the clients one after another. A client without a test split of its
    own is not judged by itself.
    """

    name = "clients"
    title = "any data sets side by side, one per client of a federation"
    tasks = ("classification",)
    licence = "of the data sets named"
    source = "the data sets named"
    edition = "as named"
    get = "data: {name: clients, options: {clients: {a: {name: image_folder, options: {...}}}}}"

    Options = ClientsOptions

    def open(self, options: ClientsOptions, seed: int) -> Splits:
        """Open every client's data."""
        opened = {name: self.client(options, seed, name) for name in options.clients}
        return joined_clients(opened, mean=options.mean, std=options.std)

    def open_client(self, options: ClientsOptions, seed: int, client: str) -> Splits:
        """Open one client's data, and no other's."""
        own = {client: self.client(options, seed, client)}
        return joined_clients(own, mean=options.mean, std=options.std)

    def client(self, options: ClientsOptions, seed: int, client: str) -> Splits:
        """The splits of one client as its own data set gives them."""
        if client not in options.clients:
            raise RecipeError(
                f"the data has no client '{client}'{nearest(client, options.clients)}"
            )
        spec = options.clients[client]
        given = dict(spec.options)
        if options.client_val is not None:
            given.setdefault("val", options.client_val)
        return open_data(spec.name, seed=seed, options=given)


def joined_clients(
    clients: Mapping[str, Splits],
    *,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    edition: str = "",
) -> Splits:
    """Splits of several clients one after another; `about["clients"]` names who has which part.

    Args:
        clients: client to its splits, in order; "train" at least.
        mean: per channel, by which every client's images are normalised; none: 0.5.
        std: likewise; none: 0.5.
        edition: name of the whole; none: those of the parts.

    Raises:
        DataError: other classes or another size of image than the first client's; no training
            data.
    """
    (first, begin), *others = clients.items()
    classes, shape = begin.about.get("classes"), begin.about.get("input")
    for name, splits in others:
        for what, wanted, key in (("classes", classes, "classes"), ("images", shape, "input")):
            found = splits.about.get(key)
            if found != wanted:
                raise DataError(
                    f"the client '{name}' has {what} {found}, '{first}' has {wanted}: all clients "
                    "need the same (data options such as image_size, channels, classes)"
                )
    sources: dict[str, list[Source]] = {}
    parts: dict[str, list[str]] = {}
    for name, splits in clients.items():
        opened = splits.judging()
        if "train" not in opened:
            raise DataError(f"the client '{name}' has no training data")
        for role in opened:
            sources.setdefault(role, []).append(opened[role])
            parts.setdefault(role, []).append(name)
    channels = int((shape or [1])[0])
    about: dict[str, Any] = {
        "classes": classes,
        "input": shape,
        "mean": mean or [0.5] * channels,
        "std": std or [0.5] * channels,
        "clients": list(clients),
        "parts": parts,
        "licence": "; ".join(
            dict.fromkeys(str(s.about.get("licence", "not stated")) for s in clients.values())
        ),
    }
    told = edition or "; ".join(f"{name}: {splits.edition}" for name, splits in clients.items())
    return Splits({role: Joined(own) for role, own in sources.items()}, told, about)


def client_source(splits: Splits, role: str, client: str) -> Source | None:
    """One client's part of a split; None where it has none.

    Raises:
        DataError: the splits are not divided among clients, or not into these parts.
    """
    owners: list[str] = splits.about.get("parts", {}).get(role, [])
    if client not in owners:
        return None
    source = splits[role]
    if not isinstance(source, Joined) or len(source.sources) != len(owners):
        raise DataError(
            f"the split '{role}' of '{splits.edition}' is not the clients' parts one after another"
        )
    return source.sources[owners.index(client)]


def with_own_val(splits: Splits, val: int | float | None, *, seed: int, client: str) -> Splits:
    """A client's splits with validation rows carved off its own training rows.

    Args:
        splits: of the client.
        val: rows, or a share below 1; none: a tenth; 0: none.
        seed: of the run.
        client: whose; it decides the draw, so that clients do not depend on each other.
    """
    if "val" in splits or val == 0:
        return splits
    opened = splits.judging()
    train = opened["train"]
    wanted = _VAL if val is None else val
    count = round(wanted * len(train)) if isinstance(wanted, float) else wanted
    rest, held = carve(train, count, generator(seed, "client val", client))
    return Splits({**dict(opened), "train": rest, "val": held}, splits.edition, splits.about)


def open_client(
    name: str, client: str, *, seed: int = 0, options: Mapping[str, Any] | None = None
) -> Splits:
    """The data of one client alone.

    Where the data set cannot be opened for one client, it is opened whole.

    Args:
        name: of the data set, as in a recipe.
        client: whose part.
        seed: of the run.
        options: of the data set.

    Raises:
        RecipeError: no such client.
    """
    from stillhouse.data.options import checked_options

    if ":" not in name:
        data = load_data(name)
        opener = getattr(data, "open_client", None)
        if opener is not None:
            found: Splits = opener(checked_options(name, data.Options, options or {}), seed, client)
            return found
    splits = open_data(name, seed=seed, options=options)
    known = splits.about.get("clients", [])
    if client not in known:
        raise RecipeError(f"the data '{name}' has no client '{client}'{nearest(client, known)}")
    return splits


__all__ = [
    "Clients",
    "ClientsOptions",
    "client_source",
    "joined_clients",
    "open_client",
    "with_own_val",
]
