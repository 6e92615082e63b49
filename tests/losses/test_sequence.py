from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.losses.sequence import token_cross_entropy


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_loss_vectors(golden, dtype, tolerance):
    case = golden("llmlingua2").case("loss")
    logits = torch.tensor(case["logits"], dtype=dtype, requires_grad=True)
    labels = torch.tensor(case["labels"])
    loss = token_cross_entropy(logits, labels)
    loss.backward()
    np.testing.assert_allclose(loss.item(), case["loss"], rtol=tolerance)
    np.testing.assert_allclose(logits.grad, case["grad"], rtol=tolerance, atol=tolerance / 10)
    official = token_cross_entropy(logits, labels, ignored_as=0)
    np.testing.assert_allclose(official.item(), case["loss_official_style"], rtol=tolerance)
    hidden = labels == -100
    assert (torch.tensor(case["attention_mask"])[hidden] == 0).any()


def test_unlabelled_tokens_change_nothing():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 3), torch.randint(0, 3, (2, 5))
    labels[:, 3:] = -100
    loss = token_cross_entropy(logits, labels)
    logits[:, 3:] += 100 * torch.randn(2, 2, 3)
    torch.testing.assert_close(token_cross_entropy(logits, labels), loss)
    assert token_cross_entropy(logits.bfloat16(), labels).dtype == torch.float32
    assert token_cross_entropy(logits, torch.full((2, 5), -100)).isnan()


def test_shapes_that_do_not_fit_are_told():
    with pytest.raises(ModelError, match=r"\(2, 5, 3\).*\(2, 4\)"):
        token_cross_entropy(torch.zeros(2, 5, 3), torch.zeros(2, 4, dtype=torch.int64))
