"""A user's own instructions: prompts and responses in jsonl files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from stillhouse.batch import Splits
from stillhouse.data.data_set import DataSet
from stillhouse.data.e2e_nlg import by_prompt
from stillhouse.data.prompt_options import PromptOptions
from stillhouse.data.prompt_rows import Pair, prompt_splits
from stillhouse.data.split_files import files_of_splits, hash_of_splits
from stillhouse.errors import DataError, RecipeError
from stillhouse.parts.text_lines import field_of, json_lines, prompt_of

# Names under which a response is found, in order of preference.
RESPONSES = ("output", "response", "answer", "completion", "references")
_WANTED = "train.jsonl (or train.jsonl.gz)"


class PromptResponseOptions(PromptOptions):
    """Options of the user's own prompts and responses."""

    path: str = Field(
        description="a .jsonl file, or a folder with train.jsonl and, if there are any, val.jsonl "
        "and test.jsonl (each with .gz if packed): as it stands, or below a data root"
    )
    prompt: str | None = Field(
        None,
        description="field of the prompt; none: prompt, or instruction with input below it, or "
        "question, or query",
    )
    response: str | None = Field(
        None,
        description="field of the response, a text or a list of good ones; none: output, "
        "response, answer, completion or references",
    )
    test: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of prompts held out for the test by subset_seed; only where there is "
        "no test file, and a tenth when not said",
    )
    validation: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of prompts held out for validation; only where there is no val file, "
        "and a twentieth when not said",
    )
    limit: int | None = Field(None, ge=3, description="read at most so many rows of each file")


class PromptResponses(DataSet[PromptResponseOptions]):
    """Prompts and responses, one JSON object a line: {"prompt": ..., "output": ...}.

    Also of the Alpaca form (instruction, input, output). Where the response is a list, the first
    is learned from and all are references when judging; rows of equal prompts share theirs.
    """

    name = "prompt_responses"
    title = "your own prompts and responses in jsonl files"
    tasks = ("text-generation",)
    licence = "the user's"
    source = "the user's"
    edition = "as given"

    Options = PromptResponseOptions

    def open(self, options: PromptResponseOptions, seed: int) -> Splits:
        """The splits there are; "val" and "test" are held out of train where there are none."""
        files = files_of_splits(options.path, (".jsonl",), _WANTED)
        official = {role: _pairs(path, options) for role, path in files.items()}
        shares = {}
        for role, said, usual in (("test", options.test, 0.1), ("val", options.validation, 0.05)):
            if role not in official:
                shares[role] = usual if said is None else said
            elif said is not None:
                option = "validation" if role == "val" else role
                raise RecipeError(
                    f"data option '{option}': {options.path} has a {role} file; leave it out"
                )
        if shares:
            held = by_prompt(official["train"], shares, seed=options.subset_seed, name=options.path)
            official = {**official, **held}
        name = Path(options.path).name
        splits = prompt_splits(
            self, official, options, digest=hash_of_splits(files), edition="as given"
        )
        splits.edition = f"{name} (as given)"
        splits.about["source"] = str(options.path)
        return splits


def _pairs(path: Path, options: PromptResponseOptions) -> list[Pair]:
    rows: list[tuple[str, list[str]]] = []
    for line, entry in json_lines(path):
        if options.limit is not None and len(rows) == options.limit:
            break
        where = f"{path}, line {line}"
        rows.append(
            (prompt_of(entry, options.prompt, where), _said(entry, options.response, where))
        )
    if not rows:
        raise DataError(f"{path} is empty: it holds no rows")
    known: dict[str, dict[str, None]] = {}
    for prompt, said in rows:
        known.setdefault(prompt, {}).update(dict.fromkeys(said))
    return [Pair(prompt, said[0], tuple(known[prompt])) for prompt, said in rows]


def _said(entry: Mapping[str, Any], field: str | None, where: str) -> list[str]:
    name = field_of(entry, RESPONSES if field is None else (field,), "response", where)
    found = entry[name]
    texts = [found] if isinstance(found, str) else found
    good = isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)
    if not good or not all(text.strip() for text in texts):
        raise DataError(
            f"{where}: a text, or a list of texts, is needed in the field '{name}', found {found!r}"
        )
    return list(texts)
