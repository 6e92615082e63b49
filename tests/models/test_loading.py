"""Models by id: found, built for the data, loaded strictly, or told what is wrong."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stillhouse.artifact import Artifact
from stillhouse.batch import Splits, TensorSource
from stillhouse.errors import MissingExtra, ModelError
from stillhouse.models.loading import (
    find_folder,
    imported,
    load_model,
    load_weights,
    read_weights,
    reference_networks,
)
from stillhouse.models.mlp import MLP
from stillhouse.models.resnet_cifar import resnet20
from stillhouse.net import Net, find_head
from stillhouse.tasks.classification import Classification

IMAGES = {"classes": list("abcdefg"), "input": [3, 32, 32]}
GREY = {"classes": list("abc"), "input": [1, 28, 28]}
TEXTS = {"classes": list("ab"), "input": {"length": 12}, "vocabulary": 100}
TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """No downloads, whatever the machine."""
    monkeypatch.setenv("STILLHOUSE_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STILLHOUSE_DATA", raising=False)
    return tmp_path / "cache" / "models"


# -- the reference networks ----------------------------------------------------------------


def test_reference_networks_are_found_without_importing_them():
    known = reference_networks()
    assert {"mlp", "resnet8", "resnet56", "small_cnn", "text_cnn", "convnet"} <= set(known)
    # inner blocks and readers of files are no networks
    assert not {"basicblock", "describe_published", "hashembedding"} & set(known)


def test_the_shape_of_the_data_fills_what_the_recipe_leaves_out():
    net = load_model("stillhouse:mlp", options={"widths": [5]}, about=IMAGES)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    convnet = load_model("stillhouse:convnet", options={"width": 8}, about=GREY)
    assert convnet(torch.randn(2, 1, 28, 28)).shape == (2, 3)
    own = load_model("stillhouse:resnet-8", options={"classes": 4}, about=IMAGES)
    assert own(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    text = load_model("stillhouse:text_cnn", about=TEXTS)
    assert text(torch.randint(0, 100, (2, 12))).shape == (2, 2)


def test_channels_of_images_are_not_taken_for_a_width():
    about = {"scale": 2, "channels": 3, "input": (3, 24, 24)}
    net = load_model("stillhouse:imdn", options={"channels": 8, "blocks": 1}, about=about)
    assert net(torch.rand(1, 3, 9, 7)).shape == (1, 3, 18, 14)
    assert load_model("stillhouse:imdn", about=about).fea_conv.out_channels == 64


def test_unknown_names_and_options_are_told_with_near_ones():
    with pytest.raises(ModelError, match="'stillhouse:resnet21'; did you mean 'resnet"):
        load_model("stillhouse:resnet21")
    with pytest.raises(ModelError, match="no option 'width'; did you mean 'widths'"):
        load_model("stillhouse:mlp", options={"width": 3})
    with pytest.raises(ModelError, match="did you mean 'stillhouse:resnet20'"):
        load_model("resnet20")
    with pytest.raises(ModelError, match=r"'tim', which cannot be imported.*did you mean 'timm'"):
        load_model("tim:resnet18")
    with pytest.raises(ModelError, match="publishes no weights; give weights: a file"):
        load_model("stillhouse:mlp", weights="pretrained", about=IMAGES)


def test_a_module_is_passed_through_with_weights(tmp_path: Path):
    net, other = nn.Linear(2, 3), nn.Linear(2, 3)
    assert load_model(net) is net
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    load_model(net, weights=tmp_path / "w.safetensors")
    assert torch.equal(net.weight, other.weight)


def test_a_factory_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_models.py").write_text(
        "import torch\n"
        "def small(num_classes, width=4):\n"
        "    return torch.nn.Sequential(torch.nn.Linear(2, width), "
        "torch.nn.Linear(width, num_classes))\n"
        "def text():\n    return 'no module'\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    net = load_model("own_models:small", options={"width": 6}, about=IMAGES)
    assert net(torch.randn(1, 2)).shape == (1, 7)
    assert sys.path == path
    with pytest.raises(ModelError, match=r"made a str; an nn.Module is needed"):
        load_model("own_models:text")
    with pytest.raises(ModelError, match="no function 'smal'; did you mean 'small'"):
        load_model("own_models:smal")
    with pytest.raises(ModelError, match="needs the option 'num_classes'"):
        load_model("own_models:small")
    (tmp_path / "lacking.py").write_text("import surely_not_installed\n")
    with pytest.raises(ModelError, match="needs the package 'surely_not_installed'"):
        imported("lacking:thing", "model")


# -- weights ---------------------------------------------------------------------------------


def test_normalisation_from_the_options_reaches_the_net():
    options = {"widths": [4], "input_mean": [0.5], "input_std": [0.25]}
    module = load_model("stillhouse:small_cnn", options=options, about=GREY)
    source = TensorSource({"x": torch.rand(4, 1, 28, 28), "target": torch.arange(4) % 3})
    net = Classification(Splits({"train": source}, "toys", GREY)).net(module)
    assert net.mean is not None
    assert (float(net.mean), float(net.std)) == (0.5, 0.25)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "data-parallel"])
def test_released_files_of_several_forms(tmp_path: Path, wrap: str):
    torch.manual_seed(0)
    source, target = MLP(3, 4), MLP(3, 4)
    state = dict(source.state_dict())
    if wrap == "data-parallel":
        state = {f"module.{k}": v for k, v in state.items()}
    torch.save(state if wrap in {"plain", "data-parallel"} else {wrap: state}, tmp_path / "w.pth")
    load_weights(target, read_weights(tmp_path / "w.pth"), "mlp")
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())


def test_files_that_would_run_code_are_refused(tmp_path: Path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(ModelError, match=r"cannot be read safely .*weights_only=True"):
        read_weights(tmp_path / "whole.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="holds list, not a state dict"):
        read_weights(tmp_path / "list.pth")
    (tmp_path / "w.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ModelError, match=r"w\.safetensors are damaged"):
        read_weights(tmp_path / "w.safetensors")


def test_what_does_not_fit_is_listed_with_both_shapes():
    state = dict(MLP(3, 4, (5,)).state_dict())
    with pytest.raises(ModelError) as told:
        load_weights(MLP(7, 4, (5,)), state, "stillhouse:mlp", "w.pth")
    assert "head.weight is (3, 5) in the file, (7, 5) in the model" in str(told.value)
    state["extra"] = state.pop("head.bias")
    with pytest.raises(ModelError) as told:
        load_weights(MLP(3, 4, (5,)), state, "stillhouse:mlp", "w.pth")
    assert "1 missing in the file: head.bias" in str(told.value)
    assert "1 unknown to the model: extra" in str(told.value)


def test_batch_counters_may_be_missing():
    state = {k: v for k, v in resnet20().state_dict().items() if "num_batches" not in k}
    load_weights(resnet20(), state, "resnet20")


def test_published_weights_on_the_data_root(data_root: Path):
    net = load_model(
        "stillhouse:resnet20",
        weights="data:cifar10_resnets/resnet20.safetensors",
        about={"classes": list("abcdefghij"), "input": [3, 32, 32]},
    )
    stored = read_weights(data_root / "cifar10_resnets" / "resnet20.safetensors")
    assert torch.equal(net.state_dict()["conv1.weight"], stored["conv1.weight"])
    with pytest.raises(ModelError, match=r"there are no weights .* did you mean 'resnet"):
        load_model("stillhouse:resnet20", weights="data:cifar10_resnets/resnet2.safetensors")


def test_absent_weights_say_where_was_looked(tmp_path: Path, cache: Path):
    with pytest.raises(ModelError, match="STILLHOUSE_DATA is not set"):
        load_model("stillhouse:mlp", weights="data:none.safetensors")
    (tmp_path / "wieghts.pth").touch()
    with pytest.raises(ModelError, match=r"looked at .*did you mean 'wieghts\.pth'"):
        load_model("stillhouse:mlp", weights=str(tmp_path / "weights.pth"))


# -- libraries -------------------------------------------------------------------------------


def test_timm(cache: Path, cut_off: None, tmp_path: Path):
    timm = pytest.importorskip("timm")
    net = load_model("timm:test_resnet", about=GREY)
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert not hasattr(net, "input_mean")
    with pytest.raises(ModelError, match=r"no model 'resnet19'; did you mean 'resnet18'"):
        load_model("timm:resnet19")
    with pytest.raises(ModelError, match=r"cannot be built with these options.*'fooo'"):
        load_model("timm:test_resnet", options={"fooo": 1})
    with pytest.raises(ModelError) as told:
        load_model("timm:tf_efficientnet_lite0", weights="pretrained")
    assert str(cache) in str(told.value)
    assert "make models" in str(told.value)

    # what lies in the cache under the hub's id is what "pretrained" means
    cfg = timm.models.get_pretrained_cfg("test_resnet")
    folder = cache / cfg.hf_hub_id
    folder.mkdir(parents=True)
    source = timm.create_model("test_resnet")
    save_file(source.state_dict(), folder / "model.safetensors")
    made = {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet", **made}))
    whole = load_model("timm:test_resnet", weights="pretrained")
    assert torch.equal(whole.state_dict()["conv1.0.weight"], source.state_dict()["conv1.0.weight"])
    assert whole.input_mean == [0.1, 0.2, 0.3]
    with pytest.warns(UserWarning, match="the published head has 1000 classes, the data 7"):
        fewer = load_model("timm:test_resnet", weights="pretrained", about=IMAGES)
    assert fewer.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    again = load_model(str(folder))
    assert torch.equal(again.state_dict()["conv1.0.weight"], source.state_dict()["conv1.0.weight"])
    assert again.input_std == [0.4, 0.5, 0.6]


def test_torchvision(cache: Path, cut_off: None):
    models = pytest.importorskip("torchvision.models")
    net = load_model("torchvision:squeezenet1_1", about=IMAGES)
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    with pytest.raises(ModelError, match="no model 'squeezenet'; did you mean 'squeezenet1_"):
        load_model("torchvision:squeezenet")
    folder = cache / "torchvision" / "mobilenet_v3_small.imagenet1k_v1"
    with pytest.raises(ModelError, match=r"downloads are switched off"):
        load_model("torchvision:mobilenet_v3_small", weights="pretrained")
    folder.mkdir(parents=True)
    source = models.mobilenet_v3_small()
    save_file(source.state_dict(), folder / "model.safetensors")
    loaded = load_model("torchvision:mobilenet_v3_small", weights="IMAGENET1K_V1")
    key = "features.0.0.weight"
    assert torch.equal(loaded.state_dict()[key], source.state_dict()[key])
    assert loaded.input_mean == [0.485, 0.456, 0.406]
    with pytest.warns(UserWarning, match="1000 classes, the data 7"):
        fewer = load_model("torchvision:mobilenet_v3_small", weights="IMAGENET1K_V1", about=IMAGES)
    assert torch.equal(fewer.state_dict()[key], source.state_dict()[key])
    assert fewer(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_another_published_set_that_is_here_is_named(cache: Path, cut_off: None):
    pytest.importorskip("torchvision.models")
    folder = cache / "torchvision" / "mobilenet_v2.imagenet1k_v1"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    with pytest.raises(ModelError, match="on this machine are: weights: IMAGENET1K_V1"):
        load_model("torchvision:mobilenet_v2", weights="pretrained")


def test_hugging_face_from_a_configuration(cache: Path, cut_off: None):
    pytest.importorskip("transformers")
    encoder = load_model("hf:bert", options=TINY)
    ids = torch.randint(0, 100, (2, 5))
    assert encoder(input_ids=ids).last_hidden_state.shape == (2, 5, 16)
    classifier = load_model("hf:bert", options=TINY, about=TEXTS)
    assert classifier(input_ids=ids).logits.shape == (2, 2)
    assert classifier.config.id2label == {0: "a", 1: "b"}
    tagger = load_model("hf:bert", options={**TINY, "task": "token-classification"}, about=TEXTS)
    assert tagger(input_ids=ids).logits.shape == (2, 5, 2)
    image = load_model("hf:vit", options={**TINY, "image_size": 32}, about=IMAGES)
    assert Net(image)(torch.randn(2, 3, 32, 32))["logits"].shape == (2, 7)
    assert find_head(image) == "classifier"
    with pytest.raises(ModelError, match="no option 'hiden_size'; did you mean 'hidden_size'"):
        load_model("hf:bert", options={"hiden_size": 3})
    with pytest.raises(ModelError, match="no task 'encode'; did you mean 'encoder'"):
        load_model("hf:bert", options={"task": "encode"})


def test_hugging_face_from_the_cache_and_a_folder(cache: Path, cut_off: None, tmp_path: Path):
    pytest.importorskip("transformers")
    source = load_model("hf:bert", options={**TINY, "vocab_size": 50}, about=TEXTS)
    folder = cache / "someone" / "tiny-bert"
    source.save_pretrained(folder)
    assert find_folder("someone/tiny-bert") == folder
    key = "classifier.weight"
    for model, weights in (
        ("hf:someone/tiny-bert", "pretrained"),
        (f"hf:{folder}", "pretrained"),
        (str(folder), None),
    ):
        loaded = load_model(model, weights=weights, about=TEXTS)
        assert torch.equal(loaded.state_dict()[key], source.state_dict()[key])
    fresh = load_model("hf:someone/tiny-bert", about=TEXTS)
    assert not torch.equal(fresh.state_dict()[key], source.state_dict()[key])
    assert fresh.config.vocab_size == 50
    with pytest.raises(ModelError, match=r"do not fit the data.*classifier"):
        load_model("hf:someone/tiny-bert", weights="pretrained", about=GREY | {"input": None})
    with pytest.warns(UserWarning, match=r"6 tensors .* begin at random: cls"):
        load_model("hf:someone/tiny-bert", weights="pretrained", options={"task": "masked-lm"})


def test_a_model_that_is_nowhere_is_told_at_once(cache: Path, cut_off: None):
    pytest.importorskip("transformers")
    began = time.monotonic()
    with pytest.raises(ModelError) as told:
        load_model("hf:sentence-transformers/all-MiniLM-L6-v2", weights="pretrained")
    assert time.monotonic() - began < 10
    assert str(cache) in str(told.value)
    assert "make models" in str(told.value)
    with pytest.raises(ModelError, match="put its folder"):
        load_model("hf:nobody/nothing", weights="pretrained")


def test_remote_code_is_not_run_unless_asked(cache: Path, cut_off: None):
    pytest.importorskip("transformers")
    folder = cache / "someone" / "odd"
    folder.mkdir(parents=True)
    config = {"model_type": "odd-kind", "auto_map": {"AutoConfig": "odd.OddConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text("raise SystemExit('code was run')\n")
    with pytest.raises(ModelError, match="trust_remote_code: true"):
        load_model("hf:someone/odd")


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"pip install 'stillhouse\[images\]'"):
        load_model("timm:resnet18")


# -- folders ---------------------------------------------------------------------------------


def test_an_artifact_is_a_model(tmp_path: Path):
    source = TensorSource({"x": torch.rand(4, 1, 8, 8), "target": torch.arange(4) % 3})
    about = {"classes": list("abc"), "input": [1, 8, 8], "mean": [0.3], "std": [0.2]}
    task = Classification(Splits({"train": source}, "toys", about))
    module = load_model("stillhouse:small_cnn", options={"widths": [4]}, about=about)
    made = {"id": "stillhouse:small_cnn", "options": {"widths": [4]}}
    artifact = Artifact("model", task.predictor(task.net(module)), made, meta={"about": about})
    artifact.save(tmp_path / "run" / "artifact")
    for folder in (tmp_path / "run", tmp_path / "run" / "artifact"):
        again = load_model(str(folder))
        assert torch.equal(again.state_dict()["classifier.bias"], module.classifier.bias)
        assert again.input_mean == pytest.approx([0.3])
    with pytest.raises(ModelError, match="has its own weights"):
        load_model(str(tmp_path / "run"), weights="pretrained")


def test_other_folders_are_told_apart(tmp_path: Path):
    with pytest.raises(ModelError, match=r"holds no model: neither artifact.json nor"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        load_model(str(tmp_path))
