from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.batch import Batch, Splits, TensorSource
from stillhouse.errors import ModelError
from stillhouse.models.word_tagger import WordTagger
from stillhouse.tasks import open_task

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 20}  # fmt: skip


@pytest.fixture
def task():
    source = TensorSource({"text": ["a b", "c d"]})
    return open_task("token-classification", Splits({"train": source}, "texts"))


def bert(labels: int = 2):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(**TINY, num_labels=labels, pad_token_id=0)
    return transformers.BertForTokenClassification(config)


def test_hugging_face_models_get_the_mask_of_their_padding(task):
    net = task.net(bert()).eval()
    ids = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[5, 6, 7, 0, 0]])
    alone, together = net(ids)["logits"], net(padded)["logits"]
    assert alone.shape == (1, 3, 2)
    torch.testing.assert_close(together[:, :3], alone, atol=1e-5, rtol=1e-4)


def test_the_loss_is_over_labelled_tokens(task):
    net = task.net(bert()).eval()
    batch = Batch(x=torch.tensor([[5, 6, 7, 0]]), target=torch.tensor([[1, 0, -100, -100]]))
    loss = task.loss(net(batch.view("x")), batch)["task"]
    logits = net(batch.view("x"))["logits"][0, :2]
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, torch.tensor([1, 0])))
    metric = task.metrics()["tokens"]
    metric.update(net(batch.view("x")), batch)
    assert set(metric.compute()) == {"auc", "f1", "accuracy"}


def test_models_that_do_not_tag_in_two_classes_are_refused(task):
    task.check(task.net(bert()), None)
    task.check(task.net(WordTagger(width=16, heads=2, buckets=32)), None)
    with pytest.raises(ModelError, match=r"\(1, 3, 3\).*num_labels: 2"):
        task.check(task.net(bert(3)), None)
    with pytest.raises(ModelError, match="cannot read"):
        task.check(task.net(nn.Linear(4, 2)), None)
