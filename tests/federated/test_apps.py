"""The server app and the client app, called as Flower calls them, without its processes.

Needs Flower; where it is not installed, test_flower_run.py runs this file in an environment that
has it.
"""

from __future__ import annotations

import sys

import pytest
import torch
import yaml

from stillhouse import catalogue
from stillhouse.errors import FederationError, RecipeError
from stillhouse.launch import run
from stillhouse.recipe import load_recipe

flwr = pytest.importorskip("flwr.app")

from stillhouse.federated import client, server  # noqa: E402
from stillhouse.federated.settings import Settings  # noqa: E402
from stillhouse.stages.flower import HEADER, from_records  # noqa: E402


@pytest.fixture
def recipe(tmp_path, monkeypatch, install_method):
    """The path of a recipe of the method that these tests bring."""
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(install_method(tmp_path / "plugin")))
    sys.modules.pop("fedavg_small", None)
    catalogue.scan.cache_clear()
    kind = catalogue.load("fedavg-small")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**kind.example(), "compare": []}), encoding="utf-8")
    yield path
    catalogue.scan.cache_clear()
    client._OPEN.clear()


class Nodes:
    """A grid that calls the client app with each node's context."""

    def __init__(self, run_config, configs):
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.run_config, self.configs = run_config, configs
        self.replies, self.count = [], 0

    def context(self, node):
        return flwr.Context(1, node, self.configs[node], flwr.RecordDict(), self.run_config)

    def get_node_ids(self):
        return list(self.configs)

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            self.count += 1
            message.metadata.__dict__["_message_id"] = str(self.count)
            node = message.metadata.dst_node_id
            self.replies.append((str(self.count), client.app(message, self.context(node))))
            numbers.append(str(self.count))
        return numbers

    def pull_messages(self, message_ids):
        wanted = set(message_ids)
        taken = [reply for number, reply in self.replies if number in wanted]
        self.replies = [pair for pair in self.replies if pair[0] not in wanted]
        return taken


def settings(recipe, tmp_path, **further):
    told = {"recipe": str(recipe), "folder": str(tmp_path / "run"), "timeout": 20.0}
    return {**told, "memory": str(tmp_path / "disk"), **further}


def served(told, configs):
    return server.serve(Nodes(told, configs), Settings.of(told, {}))


PARTS = {7: 1, 5: 0, 9: 2}
SIMULATED = {node: {"partition-id": part, "num-partitions": 3} for node, part in PARTS.items()}
NAMED = {1: {"client": "c"}, 2: {"client": "a"}, 3: {"client": "b"}}


@pytest.mark.parametrize("configs", [SIMULATED, NAMED], ids=["simulated", "named"])
def test_a_run_over_the_apps_equals_one_in_process(recipe, tmp_path, configs):
    there = served(settings(recipe, tmp_path), configs).artifact.module.state_dict()
    here = run(load_recipe(recipe), folder=tmp_path / "here", progress=False)
    for name, value in here.artifact.module.state_dict().items():
        assert torch.equal(there[name], value), name


def test_data_is_opened_once_per_process_and_again_for_another_recipe(recipe, tmp_path):
    told = settings(recipe, tmp_path)
    served(told, NAMED)
    assert len(client._OPEN) == 3
    served({**told, "folder": str(tmp_path / "other"), "options": "seed=1"}, NAMED)
    assert len(client._OPEN) == 6
    served({**told, "folder": str(tmp_path / "third"), "options": "seed=2"}, NAMED)
    assert len(client._OPEN) == client._MOST_OPEN


def test_a_node_with_another_recipe_is_named(recipe, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "seed": 3}))
    configs = {**NAMED, 3: {"client": "b", "recipe": str(own)}}
    with pytest.raises(RecipeError, match=r"client 'b': .* another recipe; different: seed"):
        served(settings(recipe, tmp_path), configs)


def test_a_node_may_name_other_data_of_its_own(recipe, tmp_path):
    given = yaml.safe_load(recipe.read_text())
    given["data"]["options"]["clients"] = {"b": given["data"]["options"]["clients"]["b"]}
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(given))
    configs = {**NAMED, 3: {"client": "b", "recipe": str(own)}}
    served(settings(recipe, tmp_path), configs)
    assert (tmp_path / "run" / "run.json").exists()


def test_the_server_needs_none_of_the_clients_data(recipe, tmp_path):
    given = yaml.safe_load(recipe.read_text())
    for spec in given["data"]["options"]["clients"].values():
        spec["options"]["rows"] = 8  # stands in for it, with other rows
    at_server = tmp_path / "server.yaml"
    at_server.write_text(yaml.safe_dump(given))
    configs = {n: {**node, "recipe": str(recipe)} for n, node in NAMED.items()}
    there = served(settings(at_server, tmp_path), configs).artifact.module.state_dict()
    here = run(load_recipe(recipe), folder=tmp_path / "here", progress=False)
    for name, value in here.artifact.module.state_dict().items():
        assert torch.equal(there[name], value), name


def test_a_node_without_a_name_is_told_how_to_be_one(recipe, tmp_path):
    with pytest.raises(FederationError, match=r"at node 4.*no client.*--node-config"):
        served(settings(recipe, tmp_path), {4: {}, **NAMED})


def test_a_node_answers_for_itself_only(recipe, tmp_path):
    from stillhouse.stages.flower import to_records

    nodes = Nodes(settings(recipe, tmp_path), NAMED)
    content = to_records({}, exchange=0, client="b", recipe="{}")
    (number,) = nodes.push_messages([flwr.Message(content, 2, "train")])
    (reply,) = nodes.pull_messages([number])
    assert "this node is client 'a' and was asked as 'b'" in reply.content[HEADER]["error"]


def test_a_client_that_lost_its_disk_is_told(recipe, tmp_path):
    import shutil

    told = settings(recipe, tmp_path)

    class Losing(Nodes):
        def push_messages(self, messages):
            for message in messages:
                if message.metadata.group_id == "1":
                    shutil.rmtree(tmp_path / "disk")
                    client._OPEN.clear()
            return super().push_messages(messages)

    with pytest.raises(Exception, match="does not remember"):
        server.serve(Losing(told, NAMED), Settings.of(told, {}))


def test_methods_that_are_not_federated_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="'kd' is not federated"):
        served({"recipe": "kd", "folder": str(tmp_path / "run")}, NAMED)


def test_replies_carry_what_was_asked(recipe, tmp_path):
    nodes = Nodes(settings(recipe, tmp_path), NAMED)
    seen = []
    pull = nodes.pull_messages

    def looking(numbers):
        found = pull(numbers)
        seen.extend(m.content for m in found if "shape" in m.content[HEADER])
        return found

    nodes.pull_messages = looking
    server.serve(nodes, Settings.of(nodes.run_config, {}))
    asked = [(h["client"], h["exchange"]) for _, h in map(from_records, seen)]
    assert asked == [(name, number) for number in range(3) for name in "abc"]
