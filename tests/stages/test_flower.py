"""Messages as Flower's records, and rounds over a grid that loses, delays and fails.

Needs Flower; where it is not installed, tests/slow/test_flower_run.py runs this file in an
environment that has it.
"""

from __future__ import annotations

import math
import threading
import time

import pytest
import torch

from stillhouse.errors import CheckpointError, DataError, FederationError, RecipeError
from stillhouse.stages.federation import InProcess, Remembering, Server

app = pytest.importorskip("flwr.app")

from stillhouse.stages.flower import (  # noqa: E402
    HEADER,
    WHO,
    FlowerTransport,
    error_records,
    from_records,
    to_records,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def bits(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def over_the_wire(records):
    """What Flower itself makes of it: every object to bytes and back."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    contents = {key: value.deflate() for key, value in get_all_nested_objects(records).items()}
    return inflate_object_from_contents(records.object_id, contents)


# --------------------------------------------------------------------------- conversion
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 3)], ids=str)
def test_tensors_come_back_bit_for_bit(dtype, shape):
    raw = torch.randint(0, 2, shape) if dtype == torch.bool else torch.randn(shape) * 30
    tensor = raw.to(dtype)
    message, header = from_records(over_the_wire(to_records({"w": tensor}, run="r", round=3)))
    assert header == {"run": "r", "round": 3}
    assert message["w"].dtype == dtype
    assert message["w"].shape == tensor.shape
    assert bits(message["w"]) == bits(tensor)


def test_bits_that_compare_unequal_or_equal_falsely_survive():
    special = torch.tensor([math.nan, -0.0, math.inf, -math.inf, 1e-45])
    message, _ = from_records(over_the_wire(to_records({"s": special, "b": special.bfloat16()})))
    assert bits(message["s"]) == bits(special)
    assert bits(message["b"]) == bits(special.bfloat16())


def test_views_parameters_and_shared_memory_travel_as_values():
    base = torch.arange(12.0).reshape(3, 4)
    sent = {"t": base.t(), "row": base[1], "p": torch.nn.Parameter(base), "same": base}
    message, _ = from_records(over_the_wire(to_records(sent)))
    for name, tensor in sent.items():
        assert torch.equal(message[name], tensor.detach())
        assert not message[name].requires_grad
    message["same"].zero_()
    assert torch.equal(message["p"], base)


def test_numbers_strings_and_nests_come_back_as_they_were():
    sent = {
        "weights": {"conv.weight": torch.ones(2), "n": torch.tensor(3)},
        "numbers": [0.1, math.inf, 2**80, True, None],
        "pair": (1, "é ß"),
        "by_class": {0: "", 1: "x"},
    }
    message, _ = from_records(over_the_wire(to_records(sent)))
    assert torch.equal(message["weights"].pop("conv.weight"), torch.ones(2))
    assert torch.equal(message["weights"].pop("n"), torch.tensor(3))
    sent["weights"] = {}
    assert message == sent
    assert isinstance(message["numbers"][3], bool)
    assert math.isnan(from_records(to_records({"x": math.nan}))[0]["x"])
    assert from_records(over_the_wire(to_records({})))[0] == {}


def test_what_cannot_travel_is_named_by_its_place():
    with pytest.raises(CheckpointError, match=r"state\.a\.b is a set"):
        to_records({"a": {"b": {1}}})


def test_foreign_and_damaged_records_are_told():
    with pytest.raises(FederationError, match="no message of Stillhouse"):
        from_records(app.RecordDict())
    records = to_records({"w": torch.ones(3)})
    next(iter(records.array_records.values()))["0"].data = b"cut"
    with pytest.raises(FederationError, match="damaged"):
        from_records(records)


# ------------------------------------------------------------------------------ rounds
class Adder:
    """Adds what it is sent, and a draw of its own, to its state; counts its work."""

    worked = 0

    def answer(self, state, message, clock):
        type(self).worked += 1
        total = state.get("total", torch.zeros(2)) + message["add"]
        total = total + torch.randn(2, generator=clock.rng("own"))
        return {"total": total}, {"total": total, "step": clock.step}


class Grid:
    """A grid whose nodes answer at the next look, in reversed order, unless told otherwise."""

    def __init__(self, folder, clients):
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.folder = folder
        self.clients = dict(clients)  # node to client
        self.listed = list(self.clients)
        self.sent, self.replies, self.count = [], [], 0
        self.lose, self.refuse, self.silent, self.fail, self.raises = {}, set(), set(), {}, {}

    def get_node_ids(self):
        return list(self.listed)

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node in self.refuse:
                self.refuse.discard(node)
                numbers.append(None)
                continue
            self.count += 1
            number = f"m{self.count}"
            message.metadata.__dict__["_message_id"] = number
            self.sent.append((message.metadata.message_type, node))
            numbers.append(number)
            if node not in self.silent:
                self.replies.append((number, self.reply(message, node)))
        return numbers

    def reply(self, message, node):
        if message.metadata.message_type == WHO:
            name = self.clients[node]
            told = {"client": name} if isinstance(name, str) else name
            return app.Message(app.RecordDict({HEADER: app.ConfigRecord(told)}), reply_to=message)
        if node in self.fail:
            return app.Message(app.Error(*self.fail.pop(node)), reply_to=message)
        if node in self.raises:
            return app.Message(error_records(self.raises[node]), reply_to=message)
        asked, header = from_records(over_the_wire(message.content))
        name, number = header["client"], header["exchange"]
        client = Remembering(name, Adder(), seed=0, folder=self.folder / name)
        answer = client.answer(number, asked)
        if node in self.lose:
            self.lose[node]()
            return app.Message(app.Error(5, "gone"), reply_to=message)
        found = to_records(answer, exchange=number, client=name)
        return app.Message(found, reply_to=message)

    def pull_messages(self, message_ids):
        wanted = set(message_ids)
        taken = [m for n, m in self.replies if n in wanted]
        self.replies = [(n, m) for n, m in self.replies if n not in wanted]
        return taken[::-1]


def transport(grid, *names, **settings):
    return FlowerTransport(grid, names or ("a", "b"), **{"timeout": 20, "pause": 0.01, **settings})


MESSAGE = {"add": torch.ones(2)}


def test_rounds_over_a_grid_equal_rounds_in_process(tmp_path):
    grid = Grid(tmp_path, {30: "c", 10: "a", 20: "b"})
    names = ["b", "c", "a"]
    carried, here = transport(grid, *names), InProcess({n: Adder() for n in names}, seed=0)
    first, second = Server({}, "run"), Server({}, "run")
    for asked in (names, ["c"], names, ["a", "b"]):
        there = first.ask(carried, MESSAGE, asked)
        expected = second.ask(here, MESSAGE, asked)
        assert list(there) == list(expected) == asked
        for name in asked:
            assert torch.equal(there[name]["total"], expected[name]["total"])
            assert there[name]["step"] == expected[name]["step"]
    assert carried.nodes == {"a": 10, "b": 20, "c": 30}
    assert [kind for kind, _ in grid.sent].count(WHO) == 3
    assert [r["bytes_up"] for r in first.log] == [r["bytes_up"] for r in second.log]


def test_simulated_nodes_are_clients_by_their_number(tmp_path):
    parts = {50 - n: {"part": n, "parts": 4} for n in range(4)}
    carried = transport(Grid(tmp_path, parts), "x", "y", "z")
    carried.round(0, MESSAGE, ["z", "x"])
    assert carried.nodes == {"x": 50, "y": 49, "z": 48}
    assert carried.spare == {47}
    with pytest.raises(RecipeError, match="4 simulated SuperNodes are too few for 5 clients"):
        transport(Grid(tmp_path, parts), *"abcde").round(0, MESSAGE, ["a"])


def test_the_server_killed_before_its_checkpoint_repeats_nothing(tmp_path):
    grid = Grid(tmp_path, {1: "a", 2: "b"})
    before = Adder.worked
    server = Server({}, "run")
    server.ask(transport(grid), MESSAGE, ["a", "b"])
    saved = server.state_dict() | {"answered": dict(server.answered), "log": list(server.log)}
    lost = server.ask(transport(grid), MESSAGE, ["a", "b"])
    # Killed here: the next one has the checkpoint before, and its nodes have other numbers.
    grid.clients = {7: "b", 8: "a"}
    grid.listed = [7, 8]
    second, carried = Server({}, "run"), transport(grid)
    second.load_state_dict(saved)
    again = second.ask(carried, MESSAGE, ["a", "b"])
    assert all(torch.equal(again[n]["total"], lost[n]["total"]) for n in "ab")
    second.ask(carried, MESSAGE, ["a", "b"])
    assert Adder.worked - before == 6


def test_a_client_that_dies_with_its_reply_is_asked_where_it_comes_back(tmp_path):
    grid = Grid(tmp_path, {1: "a", 2: "b"})
    before = Adder.worked

    def moved():
        grid.listed = [2, 9]
        grid.clients = {2: "b", 9: "a"}
        grid.lose.clear()

    grid.lose[1] = moved
    carried = transport(grid)
    assert list(carried.round(0, MESSAGE, ["a", "b"])) == ["a", "b"]
    assert carried.nodes == {"a": 9, "b": 2}
    assert Adder.worked - before == 2


def test_all_come_back_as_other_nodes_while_the_dead_are_still_listed(tmp_path):
    grid = Grid(tmp_path, {1: "a", 2: "b"})
    carried = transport(grid)
    carried.round(0, MESSAGE, ["a", "b"])
    grid.clients |= {8: "a", 9: "b"}
    grid.listed = [2, 8, 9]  # 1 is known to be gone, 2 is not yet
    grid.silent = {2}
    assert list(carried.round(1, MESSAGE, ["a", "b"])) == ["a", "b"]
    assert carried.nodes == {"a": 8, "b": 9}


def test_a_client_that_always_crashes_is_not_asked_for_ever(tmp_path):
    grid = Grid(tmp_path, {1: "a"})
    grid.fail = Always({1: (8, "crashed")})
    with pytest.raises(FederationError, match="'a' crashed 3 times"):
        transport(grid).round(0, MESSAGE, ["a"])
    assert [kind for kind, _ in grid.sent].count("train") == 3


class Always(dict):
    """A failure that stays."""

    def pop(self, key):
        return self[key]


def test_a_message_that_is_not_taken_is_sent_again(tmp_path):
    grid = Grid(tmp_path, {1: "a"})
    carried = transport(grid)
    carried.round(0, MESSAGE, ["a"])
    grid.refuse.add(1)
    assert set(carried.round(1, MESSAGE, ["a"])) == {"a"}


def test_clients_may_come_late_and_strangers_hold_up_nobody(tmp_path):
    grid = Grid(tmp_path, {1: "a", 2: "of another run", 3: "b", 4: "a"})
    grid.listed, grid.silent = [2, 1, 4], {4}  # 4: dead, but listed still
    threading.Timer(0.2, lambda: grid.listed.append(3)).start()
    carried = transport(grid)
    assert list(carried.round(0, MESSAGE, ["a", "b"])) == ["a", "b"]
    assert carried.spare == {2}


def test_a_client_that_does_not_come_is_named(tmp_path):
    carried = transport(Grid(tmp_path, {1: "a"}), timeout=0.2)
    began = time.monotonic()
    with pytest.raises(FederationError, match=r"'b' did not come .* of 1 .* clients: 'a'"):
        carried.round(0, MESSAGE, ["a", "b"])
    assert time.monotonic() - began < 5


def test_a_client_that_does_not_exist_is_refused_before_any_is_asked(tmp_path):
    grid = Grid(tmp_path, {1: "mnist"})
    with pytest.raises(RecipeError, match="no client 'mnits'; did you mean 'mnist'"):
        transport(grid, "mnist").round(0, MESSAGE, ["mnist", "mnits"])
    assert not grid.sent


def test_a_client_that_does_not_answer_is_named(tmp_path):
    grid = Grid(tmp_path, {1: "a", 2: "b"})
    carried = transport(grid, timeout=0.3)
    carried.round(0, MESSAGE, ["a", "b"])
    grid.silent = {2}
    with pytest.raises(FederationError, match=r"no reply within 0\.3 s from 'b'"):
        carried.round(1, MESSAGE, ["a", "b"])


def test_what_a_client_says_of_its_failure_is_raised_here(tmp_path):
    grid = Grid(tmp_path, {1: "a"})
    grid.raises[1] = DataError("no images in /data")
    with pytest.raises(DataError, match="client 'a': no images in /data"):
        transport(grid).round(0, MESSAGE, ["a"])


def test_a_client_app_that_breaks_is_told_with_its_reason(tmp_path):
    grid = Grid(tmp_path, {1: "a"})
    grid.fail[1] = (2, "<class 'ZeroDivisionError'>")
    with pytest.raises(FederationError, match=r"client app of 'a' failed .*ZeroDivisionError"):
        transport(grid).round(0, MESSAGE, ["a"])


def test_two_nodes_of_one_client_are_refused(tmp_path):
    with pytest.raises(FederationError, match="two nodes say that they are client 'a'"):
        transport(Grid(tmp_path, {1: "a", 2: "a"})).round(0, MESSAGE, ["a"])


@pytest.mark.parametrize("setting", [{"timeout": 0}, {"pause": -1}])
def test_times_are_checked(tmp_path, setting):
    with pytest.raises(RecipeError, match="above 0"):
        transport(Grid(tmp_path, {}), **setting)
