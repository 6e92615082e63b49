"""What a recipe may say about pairs of prompt and response."""

from __future__ import annotations

from pydantic import Field

from stillhouse.data.options import DataOptions


class PromptOptions(DataOptions):
    """Options of data whose rows are a prompt and its response."""

    tokenizer: str = Field(
        "words",
        description="words: the words and marks of the training texts; bpe: parts of words, "
        "learnt from the training texts; else hub id or folder of a Hugging Face tokenizer, that "
        "of the models",
    )
    merges: int = Field(
        1000, ge=0, description="of bpe: pairs that are joined, on top of the 256 bytes"
    )
    least: int = Field(
        2, ge=1, description="of words: how often one occurs in training to become a token"
    )
    template: str | None = Field(
        None,
        description="of the prompt, with {prompt} where its text goes, or chat for the tokenizer's "
        "own form of what a user says; none: the text and a break token for words, '{prompt}' and "
        "a new line for other tokenizers",
    )
    length: int = Field(
        512, ge=8, le=8192, description="most tokens of a row; a longer response loses its end"
    )
    prompt_length: int = Field(
        256, ge=1, le=8192, description="most tokens of a prompt; a longer one loses its beginning"
    )
    subset_seed: int = Field(0, description="seed of what is held out; not the run's seed")
    train_prompts: int | None = Field(
        None,
        ge=1,
        description="learn from so many of the training prompts, with all their responses, drawn "
        "by subset_seed; words and bpe are still those of all training texts, so that a teacher "
        "of the whole data fits",
    )
    new_tokens: int | None = Field(
        None,
        ge=1,
        description="most tokens of a response that is generated to judge a model; none: those of "
        "the longest in training",
    )
    draws: int = Field(
        1,
        ge=0,
        description="samples at temperature 1 of each response to judge by, beside the greedy one",
    )
