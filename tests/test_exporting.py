"""Export: each form read back by its own library gives the model's answers; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.artifact import Artifact, Predictor
from stillhouse.errors import MissingExtra, ModelError, RecipeError
from stillhouse.exporting import compared, export_artifact, free_axes
from stillhouse.models.loading import load_model
from stillhouse.net import Net
from stillhouse.parts.bev_grid import Grid
from stillhouse.tasks.classification import Classifier
from stillhouse.tasks.driving import BevDetector, GridNet

CLASSES = ["cat", "dog", "eel"]
MEAN, STD = [0.2, 0.3, 0.4], [0.5, 0.6, 0.7]


def saved(
    folder: Path,
    model: str,
    *,
    options: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    normalised: bool = False,
    answer: str = "logits",
) -> nn.Module:
    """An artifact of a freshly initialised model; returns its net."""
    torch.manual_seed(3)
    facts = {"classes": CLASSES, "input": [3, 16, 16]} if about is None else about
    module = load_model(model, options=options, about=facts)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean = torch.rand(part.num_features)
    net = Net(
        module, answer=answer, mean=MEAN if normalised else None, std=STD if normalised else None
    )
    shown = {"classes": CLASSES, "input": facts.get("input")} if settings is None else settings
    Artifact(
        "model",
        predictor=Classifier(net.eval(), shown),
        model={"id": model, "options": options or {}},
        meta={"about": facts},
    ).save(folder)
    return net


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration and tokenizer of a very small BERT."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "some", "words", "a", "few"]
    (folder / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    config.save_pretrained(folder)
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def run_onnx(path: Path, feed: dict[str, Tensor]) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in feed.items()})[0])


def test_onnx_holds_the_normalisation_and_takes_any_batch_and_size(tmp_path: Path) -> None:
    net = saved(tmp_path / "a", "stillhouse:small_cnn", normalised=True)
    told = export_artifact(tmp_path / "a", "onnx")
    assert told["inputs"] == {"x": ["batch", "3", "height", "width"]}
    assert told["largest_difference"] < 1e-5
    view = torch.rand(5, 3, 24, 20)
    with torch.no_grad():
        expected = net(view)["logits"]
    torch.testing.assert_close(
        run_onnx(tmp_path / "a/export/onnx/model.onnx", {"x": view}), expected, atol=1e-5, rtol=1e-4
    )


def test_onnx_of_a_model_with_a_fixed_size_has_a_free_batch_only(tmp_path: Path) -> None:
    saved(tmp_path / "a", "stillhouse:mlp", options={"widths": [4]})
    told = export_artifact(tmp_path / "a", "onnx", tmp_path / "out" / "mine.onnx")
    assert told["inputs"] == {"x": ["batch", "3", "16", "16"]}
    assert told["files"] == ["mine.onnx"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.onnx"]


@pytest.mark.parametrize(
    "sensors",
    [["lidar"], ["camera"], pytest.param(["lidar", "camera"], marks=pytest.mark.slow)],
    ids="+".join,
)
def test_a_detector_over_the_ground_takes_any_frames_in_onnx(
    tmp_path: Path, sensors: list[str]
) -> None:
    ground = {"range": [-8.0, -8.0, -3.0, 8.0, 8.0, 3.0], "cell": [0.5, 0.5]}
    facts = {"categories": CLASSES, "grid": ground}
    about = {"facts": facts, **facts}
    options = {
        "sensors": sensors, "width": 6, "widths": [6, 6, 6], "head_width": 6,
        "image_width": 8, "depths": [1.0, 9.0, 5],
    }  # fmt: skip
    torch.manual_seed(3)
    module = load_model("stillhouse:mini_bev", options=options, about=about)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean = -0.2 * torch.rand(part.num_features)  # no unit is dead
            part.running_var = torch.rand(part.num_features) * 0.2 + 0.1
    net = GridNet(module, grid=Grid.of(ground)).eval()
    Artifact(
        "model",
        predictor=BevDetector(net, facts),
        model={"id": "stillhouse:mini_bev", "options": options},
        meta={"about": about},
    ).save(tmp_path)
    told = export_artifact(tmp_path, "onnx")
    assert told["outputs"] == ["heat", "regression"]
    view = {}
    if "lidar" in sensors:
        assert told["inputs"]["points"] == ["batch", "points", "4"]
        view["points"] = torch.rand(1, 90, 4) * torch.tensor([18.0, 18, 6, 1]) - 9.0
        view["points"][..., 2] += 6.0
        view["point_count"] = torch.tensor([77])
    if "camera" in sensors:
        assert told["inputs"]["images"] == ["batch", "views", "3", "height", "width"]
        view["images"] = torch.rand(1, 3, 3, 30, 41)  # other sides, and no whole cells
        lens = torch.tensor([[33.0, 0.5, 20.1], [0.0, 34.0, 15.2], [0.0, 0.0, 1.0]])
        view["intrinsics"] = lens.repeat(1, 3, 1, 1)
        view["cameras"] = module.example_view(torch.Generator().manual_seed(1))["cameras"][:1]
        view["cameras"] = view["cameras"][:, [0, 1, 1]].clone()
        view["cameras"][..., :3, 3] += torch.rand(1, 3, 3)
    with torch.no_grad():
        expected = net(view)
        for name in {"points", "images"} & set(view):  # what is seen matters
            other = net({**view, name: view[name] * 0.5})["heat"]
            assert (expected["heat"] - other).abs().max() > 0.01 * expected["heat"].std()
    got = run_onnx(tmp_path / "export/onnx/model.onnx", view)
    torch.testing.assert_close(
        got, expected["heat"], atol=1e-5 * float(expected["heat"].abs().max()), rtol=1e-5
    )
    export_artifact(tmp_path, "torch")
    note = (tmp_path / "export/torch/README.md").read_text()
    scope: dict[str, Any] = {"path": str(tmp_path / "export/torch/model.safetensors")}
    exec(note.split("```python")[1].split("```")[0].replace('"model.safetensors"', "path"), scope)
    with torch.no_grad():
        torch.testing.assert_close(scope["model"](**view)["head"][0]["hm"], expected["heat"])


@pytest.mark.slow
def test_onnx_of_a_hugging_face_model_takes_its_keywords(tmp_path: Path, tiny_bert: Path) -> None:
    net = saved(tmp_path / "a", f"hf:{tiny_bert}", about={"classes": CLASSES})
    told = export_artifact(tmp_path / "a", "onnx")
    assert told["inputs"] == {
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "length"],
    }
    feed = {"input_ids": torch.tensor([[2, 5, 6, 3, 0]]), "attention_mask": torch.ones(1, 5).long()}
    feed["attention_mask"][0, -1] = 0
    with torch.no_grad():
        expected = net(feed)["logits"]
    got = run_onnx(tmp_path / "a/export/onnx/model.onnx", feed)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_torch_form_loads_with_the_code_of_its_note(tmp_path: Path) -> None:
    net = saved(tmp_path / "a", "stillhouse:small_cnn", normalised=True)
    out = tmp_path / "out"
    export_artifact(tmp_path / "a", "torch", out)
    note = (out / "README.md").read_text()
    code = note.split("```python")[1].split("```")[0].replace('"model.safetensors"', "path")
    scope: dict[str, Any] = {"path": str(out / "model.safetensors")}
    exec(code, scope)
    view = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        normal = (view - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        torch.testing.assert_close(scope["model"](normal), net(view)["logits"])
    about = json.loads((out / "model.json").read_text())
    assert about["mean"] == pytest.approx(MEAN)
    assert "mean [0.2" in note


def test_hf_form_opens_with_from_pretrained_and_names_the_classes(
    tmp_path: Path, tiny_bert: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    net = saved(tmp_path / "a", f"hf:{tiny_bert}", about={"classes": CLASSES})
    told = export_artifact(tmp_path / "a", "hf", tmp_path / "out")
    assert told["tokenizer"].startswith("Bert")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert list(again.config.id2label.values()) == CLASSES
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    given = tokenizer(["some words", "a few"], return_tensors="pt", padding=True)
    with torch.no_grad():
        torch.testing.assert_close(again(**given).logits, net(dict(given))["logits"])


def test_timm_form_opens_with_create_model(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    net = saved(tmp_path / "a", "timm:resnet18", normalised=True)
    export_artifact(tmp_path / "a", "timm", tmp_path / "out")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    view = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(again(view), net.module(view))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_classes"] == len(CLASSES)
    assert config["pretrained_cfg"]["mean"] == pytest.approx(MEAN)


@pytest.mark.parametrize("normalise", [False, True])
def test_sentence_transformers_form_embeds_alike(
    tmp_path: Path, tiny_bert: Path, normalise: bool
) -> None:
    package = pytest.importorskip("sentence_transformers")
    settings = {"pooling": "mean", "normalise": normalise}
    saved(
        tmp_path / "a", f"hf:{tiny_bert}", options={"task": "encoder"}, about={}, settings=settings
    )
    told = export_artifact(tmp_path / "a", "sentence-transformers", tmp_path / "out")
    assert told["largest_difference"] < 1e-5
    encoder = package.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    length = float(torch.tensor(encoder.encode("some words")).norm())
    assert (abs(length - 1) < 1e-5) is normalise


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("hf", "needs a Hugging Face model, and this is MLP"),
        ("timm", "needs a timm model, and this is MLP"),
        ("sentence-transformers", "needs a Hugging Face encoder without a head"),
    ],
)
def test_forms_that_a_model_cannot_take_are_refused_and_nothing_is_left(
    tmp_path: Path, form: str, words: str
) -> None:
    saved(tmp_path / "a", "stillhouse:mlp", options={"widths": [4]})
    with pytest.raises(ModelError, match=words):
        export_artifact(tmp_path / "a", form, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_unknown_form_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown form 'onx'; did you mean 'onnx'"):
        export_artifact(tmp_path, "onx")


def test_an_artifact_without_a_model_is_refused_and_its_attachment_named(tmp_path: Path) -> None:
    labels = Artifact("labels", records=[{"text": "a"}])
    labels.save(tmp_path / "a")
    with pytest.raises(RecipeError, match=r"'labels' holds no model to export$"):
        export_artifact(tmp_path / "a", "torch")
    saved(tmp_path / "b" / "attachments" / "compressor", "stillhouse:mlp", options={"widths": [4]})
    about = {"schema": 1, "kind": "labels", "meta": {}, "attachments": ["compressor"]}
    (tmp_path / "b" / "artifact.json").write_text(json.dumps(about))
    (tmp_path / "b" / "labels.jsonl").write_text("")
    with pytest.raises(RecipeError, match="attachments/compressor"):
        export_artifact(tmp_path / "b", "torch")


def test_an_unknown_input_asks_for_a_shape(tmp_path: Path) -> None:
    saved(tmp_path / "a", "stillhouse:small_cnn", settings={})
    described = json.loads((tmp_path / "a" / "artifact.json").read_text())
    del described["meta"]["about"]["input"]
    described["model"]["options"] = {"channels": 3}
    (tmp_path / "a" / "artifact.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match="--shape 3,32,32"):
        export_artifact(tmp_path / "a", "torch")
    assert export_artifact(tmp_path / "a", "torch", shape=[3, 16, 16])["tensors"] > 0


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "a", "stillhouse:mlp", options={"widths": [4]})
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"onnxruntime.*pip install 'stillhouse\[export\]'"):
        export_artifact(tmp_path / "a", "onnx")


def test_different_answers_are_refused() -> None:
    ours = {"logits": torch.ones(2, 3)}
    assert compared(ours, {"logits": torch.ones(2, 3) + 1e-6}, "it") < 1e-5
    with pytest.raises(ModelError, match="answers differently"):
        compared(ours, {"logits": torch.ones(2, 3) * 1.01}, "it")
    with pytest.raises(ModelError, match="answers differently"):
        compared(ours, {"logits": torch.full((2, 3), float("nan"))}, "it")
    with pytest.raises(ModelError, match=r"gives \(2, 4\) for 'logits', the model \(2, 3\)"):
        compared(ours, {"logits": torch.ones(2, 4)}, "it")
    with pytest.raises(ModelError, match="gives nothing for 'logits'"):
        compared(ours, {}, "it")


def test_axes_are_free_where_the_network_takes_any_size() -> None:
    image = torch.rand(2, 3, 4, 4)
    assert free_axes(nn.Conv2d(3, 2, 1), image) == ["batch", "height", "width"]
    assert free_axes(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), image) == ["batch"]
    assert free_axes(nn.Linear(7, 2), torch.rand(2, 7)) == ["batch"]
    words = torch.ones(2, 7, dtype=torch.int64)
    assert free_axes(nn.Embedding(5, 2), words) == ["batch", "length"]


def test_predictors_of_other_kinds_export_too(tmp_path: Path) -> None:
    net = Net(load_model("stillhouse:small_cnn", options={"channels": 3, "classes": 2}))
    plain = Artifact("model", predictor=Predictor(net), model={"id": "stillhouse:small_cnn"})
    plain.model["options"] = {"channels": 3, "classes": 2}
    plain.meta["about"] = {"input": [3, 16, 16]}
    plain.save(tmp_path)
    assert export_artifact(tmp_path, "torch")["tensors"] > 0
