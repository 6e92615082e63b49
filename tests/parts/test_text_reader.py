from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.parts.text_reader import PieceReader

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "tw", "##o", "."]


def tokenizer():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    core = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]",
    )  # fmt: skip


def test_pieces_carry_ids_and_offsets():
    reader = PieceReader(tokenizer(), 8)
    reading = reader.read("one  two ☃.")
    assert reading.pieces == ["one", "tw", "##o", "[UNK]", "."]
    assert reading.offsets == [(0, 3), (5, 7), (7, 8), (9, 10), (10, 11)]
    assert reading.codes.tolist() == [4, 5, 6, 1, 7]
    assert reader.read_word("two").tolist() == [5, 6]
    assert reader.read("").codes.shape == (0,)


def test_rows_are_framed_cut_and_padded():
    reader = PieceReader(tokenizer(), 4)
    assert (reader.room, reader.lead) == (2, 1)
    assert reader.row(torch.tensor([4, 7])).tolist() == [2, 4, 7, 3]
    assert reader.row(torch.tensor([4, 5, 6, 7])).tolist() == [2, 4, 5, 6]
    joined = reader.join([reader.row(torch.tensor([4])), reader.row(torch.tensor([4, 7]))], 6)
    assert joined.tolist() == [[2, 4, 3, 0, 0, 0], [2, 4, 7, 3, 0, 0]]


def test_tokenizers_that_will_not_do_are_told():
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="offsets"):
        PieceReader(Slow())
    bare = tokenizer()
    bare.pad_token = None
    with pytest.raises(ModelError, match="padding token"):
        PieceReader(bare)
    with pytest.raises(ModelError, match="no room"):
        PieceReader(tokenizer(), 2)
