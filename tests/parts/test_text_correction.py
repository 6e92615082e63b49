"""Correction of a text at one word, by a teacher that cuts it into bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stillhouse.batch import Batch
from stillhouse.errors import ModelError
from stillhouse.models.causal_lm import LanguageNet
from stillhouse.parts.text_alignment import read
from stillhouse.parts.text_correction import TextTeacher, meeting, reworded
from stillhouse.parts.text_sampler import TextSampler
from stillhouse.parts.text_tokens import TextTokens, bpe_tokenizer, word_tokenizer
from stillhouse.parts.token_rows import next_tokens, padded, predicting

pytest.importorskip("transformers")
WORDS = ["In the old town, a red cave is blue.", "place[city]"]
PROMPTS = ["place[city]", "place[old city]"]


class Scripted(nn.Module):
    """Logits by position behind a prompt of `asked` tokens: whatever is read, it says `said`."""

    def __init__(self, said: list[int], classes: int, asked: int, sure: float = 30.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        script = [0] * (asked - 1) + said
        logits = sure * nn.functional.one_hot(torch.tensor(script), classes).float()
        self.register_buffer("logits", logits)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None,
                use_cache=False):  # fmt: skip
        places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        if position_ids is not None:
            places = position_ids
        logits = self.logits[places.clamp_max(len(self.logits) - 1)]
        return {"logits": logits + 0 * self.weight, "past_key_values": past_key_values}


class World:
    """A student of words that says one text, and a teacher of bytes that would say another."""

    def __init__(self, said: str, teacher_said: str, *, ends: bool = True, max_new: int = 12):
        self.words = TextTokens(word_tokenizer(WORDS))
        # Both prompts have as many tokens, so that one script serves both rows.
        self.prompts = [PROMPTS[0], PROMPTS[0]]
        asked = self.words.prompts(self.prompts)
        script = self.words.response(said)
        script = script if ends else script[:-1]
        student = Scripted([*script, *[script[-1]] * 20], self.words.size, len(asked[0]))
        self.student = LanguageNet(student)
        pieces = TextTokens(bpe_tokenizer([], merges=0), template="{prompt}:", name="bytes")
        theirs = pieces.response(teacher_said)
        length = len(pieces.prompt(PROMPTS[0]))
        net = LanguageNet(Scripted([*theirs, *[pieces.end] * 9], pieces.size, length))
        net.set_apart(pieces)
        self.teacher = TextTeacher(net)
        rows = [torch.tensor([*ids, *script]) for ids in asked]
        tokens, there = padded(rows)
        answer = there & (torch.arange(tokens.shape[1]) >= len(asked[0]))
        self.rows = Batch(tokens=tokens, attention_mask=there, response_mask=answer)
        self.max_new = max_new

    def likelihood(self, rows: Any) -> torch.Tensor:
        logits = self.student(rows["tokens"])["logits"].log_softmax(-1)
        found: torch.Tensor = logits.gather(-1, next_tokens(rows["tokens"])[..., None])[..., 0]
        return found.masked_fill(~predicting(rows["response_mask"]), 0.0)

    def reworded(self) -> Any:
        sampler = TextSampler(self.max_new, end=self.words.end, padding=self.words.padding)
        chance = torch.full((2, self.max_new), 0.5)
        with torch.no_grad():
            return reworded(
                self.student, self.words, self.rows, self.prompts, self.teacher, self.likelihood,
                sampler, chance, longest=40,
            )  # fmt: skip

    def texts(self, found: Any) -> list[str]:
        return self.words.texts(found.rows["tokens"], found.rows["response_mask"])


def test_the_most_disputed_word_is_the_teachers_and_no_other():
    world = World("In the old town.", "In the red cave.")
    found = world.reworded()
    # of "old" (two letters of three) and "town" (four of four) the second
    assert world.texts(found) == ["In the old cave."] * 2
    assert found.words == [("town", "cave")] * 2
    assert found.corrected.tolist() == [True, True]
    place = found.position.tolist()
    for row, at in enumerate(place):
        assert torch.equal(found.rows["tokens"][row, :at], world.rows["tokens"][row, :at])
        (cave,) = found.rows["tokens"][row, at : at + 1].tolist()
        assert world.words.tokenizer.decode([cave]) == "cave"
    assert found.rows["tokens"][:, -1].tolist() == [world.words.end] * 2


def test_behind_the_word_the_student_goes_on_itself():
    """The teacher would say other words there too; they are not its to say."""
    world = World("In the old town.", "In the red cave, a blue city.")
    found = world.reworded()
    assert found.words[0] == ("town", "cave")
    assert world.texts(found) == ["In the old cave."] * 2


def test_full_agreement_leaves_the_text():
    world = World("In the old town.", "In the old town.")
    found = world.reworded()
    assert not found.corrected.any()
    assert found.position.tolist() == [-1, -1]
    assert found.words == [("", "")] * 2
    for name in ("tokens", "attention_mask", "response_mask"):
        assert torch.equal(found.rows[name], world.rows[name])


def test_a_text_ends_where_the_teacher_ends_it():
    world = World("In the old cave", "In the old")
    found = world.reworded()
    assert world.texts(found) == ["In the old"] * 2
    assert found.rows["tokens"][:, -1].tolist() == [world.words.end] * 2
    assert all(new == "" for _, new in found.words)


def test_an_end_that_comes_too_soon_is_put_right():
    world = World("In the old", "In the old town, a red cave.")
    found = world.reworded()
    assert found.words == [("", "town")] * 2
    for text in world.texts(found):
        assert text.startswith("In the old town")


def test_a_word_that_the_student_cannot_say_is_passed_over():
    world = World("In the old town.", "In the red wolf.")
    found = world.reworded()
    assert found.words == [("old", "red")] * 2  # "wolf" is more disputed, and no word of ours
    assert world.texts(found) == ["In the red town."] * 2
    silent = World("In the old town.", "In the bad wolf.").reworded()
    assert not silent.corrected.any()


def test_a_text_cut_off_at_its_length_is_corrected_too():
    world = World("In the old town", "In the red cave.", ends=False, max_new=4)
    found = world.reworded()
    assert world.texts(found)[0].startswith("In the old")
    assert found.rows["response_mask"].sum(1).tolist() == [4, 4]


def test_places_meet_in_rows_of_different_prompts():
    world = World("In the old town.", "In the old town.")
    texts = ["In the old town.", "a cave."]
    ours = [read(world.words, text, ended=True) for text in texts]
    theirs = [read(world.teacher.tokens, text, ended=True) for text in texts]
    asked = world.words.prompts(PROMPTS)
    rows = [
        torch.tensor([*a, *found.ids, world.words.end])
        for a, found in zip(asked, ours, strict=True)
    ]
    tokens, there = padded(rows)
    starts = torch.tensor([[len(a)] for a in asked])
    answer = there & (torch.arange(tokens.shape[1]) >= starts)
    batch = Batch(tokens=tokens, attention_mask=there, response_mask=answer)
    read_by = world.teacher.rows(PROMPTS, theirs, "cpu")
    found = meeting(batch, ours, read_by, theirs)
    assert torch.equal(found >= 0, predicting(answer))  # every boundary of words is one of bytes
    for row, text in enumerate(texts):
        first, second = int(starts[row]) - 1, len(world.teacher.tokens.prompt(PROMPTS[row])) - 1
        assert found[row, first] == second
        last = first + len(ours[row].ids)
        assert found[row, last] == second + len(text)
        # what follows the place of each side is the end
        assert next_tokens(tokens)[row, last] == world.words.end
        end = next_tokens(read_by["tokens"])[row, found[row, last]]
        assert end == world.teacher.tokens.end


def test_rows_beyond_the_teachers_context_lose_their_end():
    class Short(Scripted):
        class config:  # noqa: N801 - as modules of transformers name it
            max_position_embeddings = 14
            use_cache = True

    world = World("In the old town.", "In the old town.")
    pieces = world.teacher.tokens
    net = LanguageNet(Short([1] * 30, pieces.size, 4))
    net.set_apart(pieces)
    teacher = TextTeacher(net)
    reading = read(pieces, "In the old town.", ended=True)
    rows = teacher.rows(["city"], [reading], "cpu")
    assert rows["tokens"].shape == (1, 14)
    assert rows["response_mask"].sum() == 14 - len("city:")
    assert teacher.words(["city"], ["In the old town."], TextSampler(3, end=1), "cpu") == [None]


def test_who_shares_its_ids_is_no_teacher_of_text():
    world = World("In the old town.", "In the old town.")
    with pytest.raises(ModelError, match="its own tokenizer"):
        TextTeacher(world.student)
