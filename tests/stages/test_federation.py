"""Federation: rounds, aggregation against released values, clients that answer once."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from stillhouse.errors import CheckpointError, ModelError, RecipeError
from stillhouse.losses.distributions import gradient_cosine
from stillhouse.models.convnet import ConvNet
from stillhouse.stages.federation import (
    InProcess,
    Server,
    aggregate,
    bytes_of,
    packed,
    participants,
    pseudo_gradient,
    selected_rounds,
    unpacked,
)


def case(golden, name: str) -> dict[str, torch.Tensor]:
    return {k: torch.as_tensor(v) for k, v in golden("fedlgd").case(name).items()}


def part(
    found: dict[str, torch.Tensor], prefix: str, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    chosen = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in chosen.items()}


# ------------------------------------------------------------------------------ rounds
def test_selected_rounds_of_the_released_defaults(golden):
    found = case(golden, "rounds_5_10_100")
    rounds = selected_rounds(100, 5, 10)
    assert rounds == found["selected"].tolist() == list(range(0, 51, 5))
    assert [a for a in rounds if a > 0] == found["refresh"].tolist()


def test_rounds_end_with_the_run_and_without_updates_there_are_none():
    assert selected_rounds(20, 4, 4) == [0, 4, 8, 12, 16]
    assert selected_rounds(10, 5, 10) == [0, 5]
    assert selected_rounds(100, 5, 0) == []
    with pytest.raises(RecipeError, match="gap"):
        selected_rounds(10, 0, 1)


# ------------------------------------------------------------------------- aggregation
@pytest.mark.parametrize(
    ("mode", "keep", "dtype"),
    [("fedlgd", (), torch.float64), ("fedbn", ("bn",), torch.float32)],
)
def test_aggregation_of_the_released_code(golden, mode, keep, dtype):
    # The released code sums in float32 in its fedbn mode, so that case is exact in float32 only.
    found = case(golden, f"aggregate_{mode}")
    replies = [part(found, f"client{k}.", dtype) for k in (1, 3)]
    after = aggregate(part(found, "server.", dtype), replies, keep=keep)
    expected = part(found, "server_after.", dtype)
    assert after.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("num_batches_tracked"):  # released: of a client that was absent
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-12)


def test_identical_clients_change_nothing_and_two_meet_in_the_middle():
    one = {"w": torch.randn(3, 2, generator=torch.Generator().manual_seed(0))}
    torch.testing.assert_close(aggregate({"w": torch.zeros(3, 2)}, [one] * 3)["w"], one["w"])
    ends = [{"w": torch.zeros(2)}, {"w": torch.full((2,), 2.0)}]
    assert aggregate({"w": torch.full((2,), 9.0)}, ends)["w"].tolist() == [1.0, 1.0]
    assert aggregate(ends[0], ends, weights=[1, 3])["w"].tolist() == [1.5, 1.5]


def test_aggregation_leaves_its_inputs_alone():
    server, reply = {"bn.w": torch.zeros(2), "n": torch.tensor(0)}, {"bn.w": torch.ones(2)}
    reply["n"] = torch.tensor(4)
    after = aggregate(server, [reply], keep=("bn",))
    after["bn.w"].add_(5)
    after["n"].add_(5)
    assert server["bn.w"].tolist() == [0, 0]
    assert reply["n"].item() == 4


def test_what_cannot_be_aggregated_is_told():
    server = {"w": torch.zeros(1)}
    with pytest.raises(ModelError, match="without replies"):
        aggregate(server, [])
    with pytest.raises(ModelError, match="different tensors"):
        aggregate(server, [{"v": torch.zeros(1)}])
    with pytest.raises(RecipeError, match="positive weights"):
        aggregate(server, [server, server], weights=[1.0, 0.0])


# --------------------------------------------------------------------- pseudo-gradient
def model_of(weights: dict[str, torch.Tensor]) -> ConvNet:
    state = {name.split(".", 1)[1]: value for name, value in weights.items()}
    convs = [v for v in state.values() if v.ndim == 4]
    net = ConvNet(convs[0].shape[1], state["classifier.bias"].shape[0], 8,
                  width=convs[0].shape[0], depth=len(convs)).double()  # fmt: skip
    net.load_state_dict(state)
    return net


def test_images_move_towards_the_released_pseudo_gradient(golden):
    found = case(golden, "gradient_matching")
    before, after = part(found, "w."), part(found, "new.")
    net = model_of(before)
    target = list(pseudo_gradient(before, after, 0.01).values())
    images = found["images"].double().requires_grad_()
    optimizer = torch.optim.SGD([images], lr=1.0, momentum=0.5)
    for step in range(2):
        loss = cross_entropy(net(images), found["labels"])
        ours = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        distance = gradient_cosine(ours, target)
        torch.testing.assert_close(distance, found[f"loss.{step}"], rtol=1e-7, atol=0)
        (images.grad,) = torch.autograd.grad(distance, [images])
        if step == 0:
            torch.testing.assert_close(images.grad, found["grad_images.0"], rtol=1e-7, atol=1e-9)
        optimizer.step()
        torch.testing.assert_close(images.detach(), found[f"images.{step}"], rtol=1e-7, atol=1e-9)


def test_one_full_batch_step_gives_the_gradient():
    rng = torch.Generator().manual_seed(3)
    net = torch.nn.Linear(5, 3).double()
    x, y = torch.randn(8, 5, generator=rng).double(), torch.randint(3, (8,), generator=rng)
    before = {k: v.detach().clone() for k, v in net.named_parameters()}
    cross_entropy(net(x), y).backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    after = {k: v.detach() for k, v in net.named_parameters()}
    for name, found in pseudo_gradient(before, after, 0.1).items():
        torch.testing.assert_close(found, net.get_parameter(name).grad, rtol=1e-5, atol=1e-9)
    with pytest.raises(RecipeError, match="rate"):
        pseudo_gradient(before, after, 0.0)


# ----------------------------------------------------------------------------- messages
def test_messages_carry_tensors_and_tell_their_size():
    weights = {"a.w": torch.ones(2, 3), "n": torch.tensor(4)}
    message = {**packed("w", weights), "round": 3, "share": 0.5, "ask": "train"}
    found = unpacked("w", message)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[k], v) for k, v in weights.items())
    message["w/a.w"].zero_()
    assert weights["a.w"].sum() == 6
    assert bytes_of(message) == 6 * 4 + 8 + 8 + 8 + 5


def test_participants_are_a_share_in_their_order():
    names = [f"c{k}" for k in range(10)]
    rng = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    assert participants(names, 1.0, rng()) == names
    some = participants(names, 0.3, rng())
    assert len(some) == 3
    assert some == sorted(some, key=names.index)
    assert some == participants(names, 0.3, rng())
    assert len(participants(names, 0.01, rng())) == 1
    with pytest.raises(RecipeError, match="share"):
        participants(names, 0.0, rng())


# -------------------------------------------------------------------------- in process
class Drawing:
    """A client whose state counts its answers and whose reply is a random number."""

    def __init__(self):
        self.asked = 0

    def answer(self, state, message, clock):
        self.asked += 1
        drawn = torch.rand((), generator=clock.rng("draw")).item()
        answers = state.get("answers", 0) + 1
        return {"answers": answers}, {"drawn": drawn + message["add"], "answers": answers}


def transport(*names: str, seed: int = 0, folder=None) -> InProcess:
    return InProcess({n: Drawing() for n in names}, seed, folder)


def test_draws_depend_on_seed_client_and_round_alone():
    names, message = ["a", "b"], {"add": 0.0}
    first = transport("a", "b").round(1, message, names)
    assert first["a"] != first["b"]
    other = transport("c", "b", "a").round(1, message, ["c", "b", "a"])
    assert {n: other[n] for n in names} == first
    assert transport("a", "b").round(2, message, names)["a"] != first["a"]
    assert transport("a", "b", seed=1).round(1, message, names)["a"] != first["a"]


@pytest.mark.parametrize("kept", [False, True])
def test_a_repeated_message_is_answered_from_memory(tmp_path, kept):
    clients = transport("a", "b", folder=tmp_path if kept else None)
    first = clients.round(0, {"add": 0.0}, ["a"])
    assert clients.round(0, {"add": 7.0}, ["a"]) == first
    assert clients.states == {"a": {"answers": 1}, "b": {}}
    clients.round(1, {"add": 0.0, "after/a": 0}, ["b", "a"])
    assert clients.states == {"a": {"answers": 2}, "b": {"answers": 1}}
    assert clients.clients["a"].client.asked == 2


def served(server, clients, exchanges):
    for _ in range(exchanges):
        found = server.ask(clients, {"add": 0.0}, ["a", "b"])
        server.held["last"] = {name: reply["drawn"] for name, reply in found.items()}
    return server


def test_server_and_clients_killed_anywhere_go_on_as_if_they_had_not_been(tmp_path):
    whole = served(Server({}, "run"), transport("a", "b"), 5)
    folder = tmp_path / "memory"
    begun = served(Server({}, "run"), transport("a", "b", folder=folder), 3)
    saved = begun.state_dict()
    saved = {**saved, "log": list(saved["log"]), "answered": dict(saved["answered"])}
    served(begun, transport("a", "b", folder=folder), 1)  # and the server dies before it saves
    again, clients = Server({}, "run"), transport("a", "b", folder=folder)
    again.load_state_dict(saved)
    served(again, clients, 1)
    assert [c.client.asked for c in clients.clients.values()] == [0, 0]  # all from memory
    served(again, clients, 1)
    assert again.held == whole.held
    assert clients.states == {"a": {"answers": 5}, "b": {"answers": 5}}
    assert [r["exchange"] for r in again.log] == list(range(5))


def test_rounds_run_anew_do_not_meet_replies_of_the_past(tmp_path):
    server, clients = Server({}, "run"), transport("a", "b", folder=tmp_path)
    served(server, clients, 1)
    saved = {**server.state_dict(), "answered": {"a": 0, "b": 0}, "log": []}
    served(server, clients, 4)
    again, fresh = Server({}, "run"), transport("a", "b", folder=tmp_path)
    again.load_state_dict(saved)
    served(again, fresh, 4)
    assert [c.client.asked for c in fresh.clients.values()] == [4, 4]
    assert again.held == server.held


def test_another_run_is_not_answered_from_memory(tmp_path):
    served(Server({}, "run"), transport("a", "b", folder=tmp_path), 2)
    other, clients = Server({}, "other"), transport("a", "b", folder=tmp_path)
    served(other, clients, 2)
    assert [c.client.asked for c in clients.clients.values()] == [2, 2]
    lost = Server({}, "third")
    lost.load_state_dict({**other.state_dict(), "run": "third"})
    with pytest.raises(CheckpointError, match="does not remember"):
        served(lost, clients, 1)


def test_a_damaged_memory_is_answered_anew(tmp_path):
    server, clients = Server({}, "run"), transport("a", "b", folder=tmp_path)
    served(server, clients, 1)
    saved = {**server.state_dict(), "answered": dict(server.answered), "log": []}
    served(server, clients, 1)
    path = tmp_path / "a" / "exchange-000001.state"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = Server({}, "run")
    again.load_state_dict(saved)
    served(again, clients, 1)
    assert again.held == server.held


def test_cost_of_an_exchange_is_in_the_log():
    server = Server({"w": torch.zeros(3)}, "run")
    server.ask(transport("a", "b"), {"add": 1.0, "w/w": torch.zeros(3)}, ["a", "b"])
    (record,) = server.log
    assert record["bytes_down"] == 2 * (8 + 12)
    assert record["bytes_up"] == 2 * 16
    assert record["clients"] == "a, b"


def test_server_keeps_weights_before_and_after():
    server = Server({"w": torch.zeros(1)})
    assert torch.equal(server.before["w"], server.after["w"])
    server.move({"w": torch.ones(1)})
    assert (server.before["w"].item(), server.after["w"].item()) == (0.0, 1.0)


def test_unknown_and_silent_clients_are_told():
    clients = transport("alpha")
    with pytest.raises(RecipeError, match="no client 'alpa'"):
        clients.round(0, {"add": 0.0}, ["alpha", "alpa"])
    assert clients.clients["alpha"].client.asked == 0

    class Silent:
        def round(self, number, message, clients):
            return {}

    with pytest.raises(ModelError, match="did not reply"):
        Server({}).ask(Silent(), {}, ["alpha"])


def test_names_that_are_no_file_names_have_folders_of_their_own(tmp_path):
    clients = transport("a b", "a_b", folder=tmp_path)
    clients.round(0, {"add": 0.0}, ["a b", "a_b"])
    assert len(list(tmp_path.iterdir())) == 2
