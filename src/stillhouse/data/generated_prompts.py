"""Generated facts and sentences: for examples and contract tests, never for a measurement."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Generator

from stillhouse.batch import Splits
from stillhouse.clock import generator
from stillhouse.data.data_set import DataSet
from stillhouse.data.prompt_options import PromptOptions
from stillhouse.data.prompt_rows import prompt_splits, with_references


class GeneratedPromptOptions(PromptOptions):
    """Options of the generated pairs."""

    prompts: int = Field(24, ge=4, le=100, description="of train; val and test have half of it")
    references: int = Field(2, ge=1, le=3, description="responses to each prompt")
    least: int = Field(1, ge=1, description="how often a word occurs to become a token")
    length: int = Field(32, ge=8, le=8192, description="most tokens of a row")
    prompt_length: int = Field(16, ge=1, le=8192, description="most tokens of a prompt")


class GeneratedPrompts(DataSet[GeneratedPromptOptions]):
    """Three facts about a thing, and sentences that tell them."""

    name = "generated_prompts"
    title = "simulated facts and the sentences that tell them, for examples and tests"
    tasks = ("text-generation",)
    licence = "CC0"
    source = "made on opening"
    edition = "simulated"
    Options = GeneratedPromptOptions

    _things: ClassVar[tuple[str, ...]] = ("engine", "comet", "island", "magnet", "bridge", "cell")
    _colours: ClassVar[tuple[str, ...]] = ("red", "green", "grey", "white", "blue", "brown", "pale")
    _places: ClassVar[tuple[str, ...]] = ("harbour", "old town", "valley", "north", "market")
    _ways: ClassVar[tuple[str, ...]] = (
        "In the {place} there is a {colour} {thing}.",
        "The {thing} in the {place} is {colour}.",
        "A {colour} {thing} stands in the {place}.",
    )

    def open(self, options: GeneratedPromptOptions, seed: int) -> Splits:
        """Splits of different prompts; the seed does not enter."""
        sizes = {"train": options.prompts, "val": options.prompts // 2}
        sizes["test"] = options.prompts // 2
        rng = generator("generated prompts")
        order = torch.randperm(
            len(self._things) * len(self._colours) * len(self._places), generator=rng
        ).tolist()
        official, start = {}, 0
        for split, count in sizes.items():
            rows = order[start : start + count]
            start += count
            pairs = [pair for row in rows for pair in self._pairs(row, options.references, rng)]
            official[split] = with_references(pairs)
        splits = prompt_splits(self, official, options, digest="", edition="simulated")
        del splits.about["hash"]
        return splits

    def _pairs(self, number: int, references: int, rng: Generator) -> list[tuple[str, str]]:
        rest, thing = divmod(number, len(self._things))
        place, colour = divmod(rest, len(self._colours))
        told = {
            "thing": self._things[thing],
            "colour": self._colours[colour],
            "place": self._places[place],
        }
        prompt = ", ".join(f"{name}[{value}]" for name, value in told.items())
        ways = torch.randperm(len(self._ways), generator=rng).tolist()[:references]
        return [(prompt, self._ways[way].format(**told)) for way in ways]
