"""Sparse matrices: products and their gradients, rows, entries in any order, bad parts."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import DataError
from stillhouse.parts.sparse import SparseMatrix, linear


def drawn(seed: int, height: int = 7, width: int = 5) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    dense = torch.randn(height, width, generator=rng, dtype=torch.float64)
    dense[torch.rand(height, width, generator=rng) < 0.6] = 0.0
    dense[2] = 0.0
    return dense


@pytest.mark.parametrize("seed", range(3))
def test_products_and_gradients_are_those_of_the_dense_matrix(seed):
    dense = drawn(seed)
    matrix = SparseMatrix.of(dense)
    factor = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    out = matrix.product(factor)
    torch.testing.assert_close(out, dense @ factor)
    assert torch.autograd.gradcheck(matrix.product, (factor,))
    torch.testing.assert_close(matrix.transposed.dense(), dense.T)
    assert matrix.transposed.transposed is matrix


def test_rows_and_places():
    dense = drawn(4)
    matrix = SparseMatrix.of(dense)
    index = torch.tensor([6, 2, 0, 0])
    torch.testing.assert_close(matrix.rows(index).dense(), dense[index])
    assert len(matrix.rows(torch.tensor([], dtype=torch.int64))) == 0


def test_entries_of_one_place_are_added():
    rows, columns = torch.tensor([1, 0, 1, 1]), torch.tensor([2, 0, 2, 1])
    matrix = SparseMatrix.of_entries(rows, columns, torch.tensor([1.0, 2, 3, 4]), 3, 4)
    wanted = torch.zeros(3, 4)
    wanted[1, 2], wanted[0, 0], wanted[1, 1] = 4.0, 2.0, 4.0
    assert torch.equal(matrix.dense(), wanted)
    assert matrix.shape == (3, 4)


def test_other_values_in_its_places():
    dense = drawn(5)
    matrix = SparseMatrix.of(dense)
    doubled = matrix.with_values(matrix.values * 2)
    torch.testing.assert_close(doubled.dense(), dense * 2)
    torch.testing.assert_close(doubled.transposed.dense(), dense.T * 2)


def test_types_and_empty_matrices():
    matrix = SparseMatrix.of(drawn(6))
    assert matrix.product(torch.randn(5, 2)).dtype == torch.float32
    nothing = SparseMatrix.of(torch.zeros(3, 5))
    factor = torch.ones(5, 2, requires_grad=True)
    nothing.product(factor).sum().backward()
    assert torch.equal(factor.grad, torch.zeros(5, 2))


def test_a_linear_layer_on_either():
    layer = torch.nn.Linear(5, 3).double()
    dense = drawn(7)
    torch.testing.assert_close(linear(layer, SparseMatrix.of(dense)), linear(layer, dense))


def test_bad_parts_are_told():
    matrix = SparseMatrix.of(drawn(8))
    with pytest.raises(DataError, match="cannot be multiplied"):
        matrix.product(torch.ones(4, 2))
    with pytest.raises(DataError, match="must agree"):
        SparseMatrix(torch.tensor([0, 2]), torch.tensor([0]), torch.ones(1), 3)
    with pytest.raises(DataError, match="column 3"):
        SparseMatrix(torch.tensor([0, 1]), torch.tensor([3]), torch.ones(1), 3)


def test_the_fingerprint_follows_content():
    one, other = SparseMatrix.of(drawn(1)), SparseMatrix.of(drawn(2))
    assert one.fingerprint() == SparseMatrix.of(drawn(1)).fingerprint() != other.fingerprint()
