"""`flwr run` of a federated recipe ends as in one process, also when somebody is killed.

Each test starts a SuperLink of its own under a temporary home, with telemetry off, and leaves no
process behind. Flower's pins clash with ours, so it lives in an environment of its own, made on
first use beside those of the benchmarks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stillhouse.engine.checkpoint import read_state
from stillhouse.recipe import dump_recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "examples" / "federated"
METHOD = Path(__file__).resolve().parent / "method"
PATIENCE = float(os.environ.get("STILLHOUSE_TEST_PATIENCE", 900))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of an environment with Flower."""
    given = os.environ.get("STILLHOUSE_FLOWER_PYTHON")
    if given:
        return Path(given)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from contest import Bench, SideFailed
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    try:
        return Bench().environment("flwr[simulation]==1.41.0")
    except SideFailed as error:
        pytest.skip(f"no environment with Flower: it cannot be installed here ({error})")


def free_port() -> int:
    with socket.socket() as open_socket:
        open_socket.bind(("127.0.0.1", 0))
        return int(open_socket.getsockname()[1])


class Federation:
    """A SuperLink and its nodes, with everything they leave in one short-named folder."""

    def __init__(
        self, python: Path, folder: Path, plugin: Path, variables: Mapping[str, str]
    ) -> None:
        self.bin, self.folder, self.port = python.parent, folder, free_port()
        self.started: list[subprocess.Popen[bytes]] = []
        (folder / "killed").mkdir()
        self.env = {
            **os.environ,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(plugin)]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "STILLHOUSE_CACHE": str(folder / "cache"),
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(folder),
            "RAY_worker_niceness": "0",
            "FEDAVG_WORK": str(folder / "work"),
            "FEDAVG_KILLED": str(folder / "killed"),
            **variables,
        }
        home = folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "127.0.0.1:{self.port}"\n'
            "insecure = true\n",
            encoding="utf-8",
        )

    # ---- processes -----------------------------------------------------------------------

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        log = open(self.folder / f"{command[0]}-{len(self.started)}.log", "wb")  # noqa: SIM115
        made = subprocess.Popen(
            [str(self.bin / command[0]), *command[1:]],
            env=self.env,
            cwd=self.folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.started.append(made)
        return made

    def superlink(self, *further: str) -> None:
        self.start(
            "flower-superlink", "--insecure", "--isolation", "subprocess", "--host", "127.0.0.1",
            "--port", str(self.port), "--disable-runtime-dependency-installation", *further,
        )  # fmt: skip
        self.wait_for(self.listens, "the SuperLink to listen")

    def supernode(self, client: str) -> subprocess.Popen[bytes]:
        memory = self.folder / "disks" / client
        return self.start(
            "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}",
            "--port", str(free_port()), "--node-config", f'client="{client}" memory="{memory}"',
        )  # fmt: skip

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def wait_for(self, true, what: str, seconds: float = PATIENCE) -> None:
        until = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < until, f"waited for {what}; {self.logs()}"
            time.sleep(0.3)

    def logs(self) -> str:
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def left(self) -> list[int]:
        """Processes that carry this home in their environment: those started here, no others."""
        mark = f"FLWR_HOME={self.env['FLWR_HOME']}".encode()
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    found.append(int(place.name))
            except OSError:
                continue
        return found

    def stop(self) -> None:
        for made in self.started:
            if made.poll() is None:
                made.terminate()
        until = time.monotonic() + 15
        while self.left() and time.monotonic() < until:
            time.sleep(0.2)
        for number in self.left():
            os.kill(number, signal.SIGKILL)
        for made in self.started:
            made.wait(timeout=30)
        until = time.monotonic() + 15
        while self.left() and time.monotonic() < until:
            time.sleep(0.2)

    # ---- runs ----------------------------------------------------------------------------

    def submit(self, recipe: Path, *, stream: bool = True, clients: int = 3, **settings: str):
        told = {"recipe": recipe, "folder": self.folder / "run", **settings}
        if self.simulated:
            told.setdefault("memory", self.folder / "disk")
        config = " ".join(f'{key}="{value}"' for key, value in told.items())
        command = [
            str(self.bin / "flwr"),
            "run",
            str(APP),
            "--run-config",
            f"{config} timeout={PATIENCE}",
        ]
        if self.simulated:
            size = f"num-supernodes={clients} client-resources-num-cpus=1 init-args-num-cpus=1"
            command += ["--federation-config", size]
        done = subprocess.run(
            [*command, *(["--stream"] if stream else [])],
            env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def simulated(self) -> bool:
        return len(self.started) == 1

    def in_process(self, recipe: Path, name: str = "here") -> Path:
        """The same recipe run in one process of the same environment."""
        where = self.folder / name
        env = {k: v for k, v in self.env.items() if not k.startswith("FEDAVG")}
        # Nothing that the other run has left in the cache may be taken for this one's result.
        env["STILLHOUSE_CACHE"] = str(self.folder / "cache-here")
        done = subprocess.run(
            [str(self.bin / "python"), "-m", "stillhouse", "run", str(recipe),
             "--folder", str(where)],
            env=env, cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return where

    def work(self) -> Counter[str]:
        return Counter((self.folder / "work").read_text().splitlines())


@pytest.fixture
def federation(python: Path, install_method: Callable[[Path], Path]) -> Iterator:
    """`federation(**variables)` makes one; sockets need short paths, so not under tmp_path."""
    made: list[Federation] = []

    def make(**variables: str) -> Federation:
        folder = Path(tempfile.mkdtemp(prefix="fl-"))
        made.append(Federation(python, folder, install_method(folder / "plugin"), variables))
        return made[-1]

    yield make
    for each in made:
        each.stop()
        left = each.left()
        shutil.rmtree(each.folder, ignore_errors=True)
        assert not left


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Three clients, three rounds."""
    sys.path.insert(0, str(METHOD))
    try:
        from fedavg_small import FedAvgSmall
    finally:
        sys.path.remove(str(METHOD))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**FedAvgSmall.example(), "compare": []}), encoding="utf-8")
    return path


EACH_ONCE = Counter({f"{who} {number}": 1 for who in "abc" for number in range(3)})


def served(work: Counter[str]) -> Counter[str]:
    """The work of clients alone."""
    return Counter({what: count for what, count in work.items() if not what.startswith("server")})


def weights(run: Path) -> dict[str, bytes]:
    """Every tensor file of a run's artifact, byte for byte."""
    found = {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted((run / "artifact").rglob("*.safetensors"))
    }
    assert found
    return found


def figures(run: Path) -> dict[str, float]:
    found = json.loads((run / "side.json").read_text())["figures"]
    # The gap between clients' sets needs them at the server.
    left_out = ("seconds", "peak_mb", "domain_gap")
    return {k: v for k, v in found.items() if not k.startswith(left_out)}


def assert_same(there: Path, here: Path, *, only_here: Callable[[str], bool] | None = None) -> None:
    """Equal bit for bit; what a server in one process alone can see may be missing there."""
    distant, near = weights(there), weights(here)
    further = {name for name in near if only_here is not None and only_here(name)}
    assert distant == {name: data for name, data in near.items() if name not in further}
    assert figures(there) == figures(here)


# ---- the tests -------------------------------------------------------------------------------


def test_records_and_transport_where_flower_is(python, federation):
    made = federation()
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/stages/test_flower.py",
         "tests/federated"],
        env=made.env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    assert "could not import" not in done.stdout


def test_a_simulation_ends_as_in_one_process(federation, recipe):
    made = federation()
    made.superlink("--simulation")
    said = made.submit(recipe)
    assert f"finished: {made.folder / 'run'}" in said, said
    assert served(made.work()) == EACH_ONCE
    assert_same(made.folder / "run", made.in_process(recipe))


def test_a_simulation_killed_at_the_server_and_at_a_client_goes_on(federation, recipe):
    made = federation(FEDAVG_KILL="client:b:1,server:1")
    made.superlink("--simulation")
    said = made.submit(recipe)
    # Ray's one actor is dead: whoever was asked of it next may be told of first.
    assert re.search("FederationError: the client app of '[abc]' failed", said), said
    made.submit(recipe, stream=False)
    made.wait_for((made.folder / "killed" / "server-1").exists, "the server to be killed")
    said = made.submit(recipe)
    assert "finished: " in said, said
    # The client that was killed at work did that work anew, and nobody anything else.
    assert served(made.work()) == EACH_ONCE + Counter({"b 1": 1})
    assert made.work()["server 0"] == 1
    assert_same(made.folder / "run", made.in_process(recipe))


def test_a_deployment_with_a_killed_server_client_and_node_ends_as_in_one_process(
    federation, recipe
):
    made = federation(FEDAVG_KILL="client:b:0,server:0")
    made.superlink()
    nodes = {name: made.supernode(name) for name in "abc"}
    made.submit(recipe, stream=False)
    made.wait_for((made.folder / "killed" / "server-0").exists, "the server to be killed")
    os.killpg(nodes["c"].pid, signal.SIGKILL)
    made.supernode("c")  # another node, the same client on the same disk
    said = made.submit(recipe)
    assert "finished: " in said, said
    assert served(made.work()) == EACH_ONCE + Counter({"b 0": 1})
    assert_same(made.folder / "run", made.in_process(recipe))
    # What a client keeps lies on its own disk alone.
    for name in "abc":
        kept = {path.parent.parent.name for path in (made.folder / "disks" / name).rglob("*.state")}
        assert kept == {name}


def test_too_few_simulated_nodes_are_told_before_any_work(federation, recipe):
    made = federation()
    made.superlink("--simulation")
    said = made.submit(recipe, clients=2)
    assert "2 simulated SuperNodes are too few for 3 clients" in said, said
    assert not (made.folder / "work").exists()


FEDLGD = [
    "settings.rounds=3",
    "settings.ipc=1",
    "settings.anchors_per_class=1",
    "settings.warm_up=2",
    "settings.refresh=2",
    "settings.matching=2",
    "settings.gap=2",
    "settings.updates=2",
    "settings.local_epochs=1",
    "student.options.width=8",
]


def test_fedlgd_over_flower_ends_as_in_one_process(federation, data_root, tmp_path):
    small = load_recipe(str(ROOT / "recipes" / "fedlgd.yaml"), FEDLGD)
    path = tmp_path / "fedlgd.yaml"
    path.write_text(dump_recipe(small.model_copy(update={"compare": []})), encoding="utf-8")
    made = federation(STILLHOUSE_DATA=str(data_root))
    made.superlink("--simulation")
    said = made.submit(path, clients=5)
    assert "finished: " in said, said
    here = made.in_process(path)
    # Weights, the server's images and figures; the clients' images never left them.
    assert_same(made.folder / "run", here, only_here=lambda name: "/client-" in name)
    stored = sorted((here / "artifact" / "attachments").glob("client-*/tensors.safetensors"))
    assert len(stored) == 5
    for path in stored:
        name = path.parent.name.removeprefix("client-")
        last = sorted((made.folder / "disk").glob(f"*/{name}/memory/exchange-*.state"))[-1]
        kept, alone = read_state(last)["state"], load_file(path)
        assert torch.equal(kept["images"].float(), alone["images"])
        assert torch.equal(kept["labels"], alone["labels"])
