"""Federation: rounds, aggregation against released values, clients that answer once."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.distributions import gradient_cosine
from stillhouse.models.convnet import ConvNet
from stillhouse.stages.federation import (
    InProcess,
    aggregate,
    pseudo_gradient,
    selected_rounds,
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


# -------------------------------------------------------------------------- in process
class Drawing:
    """A client whose state counts its answers and whose reply is a random number."""

    def answer(self, state, message, clock):
        drawn = torch.rand((), generator=clock.rng("draw")).item()
        return {"answers": state["answers"] + 1}, {"drawn": drawn + message["add"]}


def transport(*names: str, seed: int = 0) -> InProcess:
    return InProcess({n: Drawing() for n in names}, {n: {"answers": 0} for n in names}, seed)


def test_draws_depend_on_seed_client_and_round_alone():
    names, message = ["a", "b"], {"add": 0.0}
    first = transport("a", "b").round(1, message, names)
    assert first["a"] != first["b"]
    other = transport("c", "b", "a").round(1, message, ["c", "b", "a"])
    assert {n: other[n] for n in names} == first
    assert transport("a", "b").round(2, message, names)["a"] != first["a"]
    assert transport("a", "b", seed=1).round(1, message, names)["a"] != first["a"]


def test_a_repeated_message_is_answered_from_memory():
    clients = transport("a", "b")
    first = clients.round(0, {"add": 0.0}, ["a"])
    assert clients.round(0, {"add": 7.0}, ["a"]) == first
    assert clients.states == {"a": {"answers": 1}, "b": {"answers": 0}}
    clients.round(1, {"add": 0.0}, ["b", "a"])
    assert clients.states == {"a": {"answers": 2}, "b": {"answers": 1}}


def test_unknown_clients_are_told_before_any_is_asked():
    clients = transport("a")
    with pytest.raises(RecipeError, match="no client 'z'"):
        clients.round(0, {"add": 0.0}, ["a", "z"])
    assert clients.states["a"]["answers"] == 0
    with pytest.raises(RecipeError, match="one state"):
        InProcess({"a": Drawing()}, {}, 0)
