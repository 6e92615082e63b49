"""E2E NLG: facts about a restaurant as a prompt, sentences that tell them as responses."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from stillhouse.batch import Splits
from stillhouse.clock import generator
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.downloads import download_file, found_or_fetched
from stillhouse.data.prompt_options import PromptOptions
from stillhouse.data.prompt_rows import Pair, prompt_splits, with_references
from stillhouse.errors import DataError
from stillhouse.parts.text_lines import content_of

Part = Literal["dev", "test"]
_RAW = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/"
_NAMES = {"dev": "devset", "test": "testset_w_refs"}


class E2EOptions(PromptOptions):
    """Options of E2E NLG."""

    path: str | None = Field(
        None,
        description="folder of files of the same form (mr,ref columns; .csv, .csv.gz), read in "
        "place of the published ones",
    )
    parts: list[Part] = Field(
        ["dev", "test"], min_length=1, description="published files that are read as one"
    )
    test: float = Field(
        0.2, gt=0, lt=1, description="share of meanings held out for the test, by subset_seed"
    )
    validation: float = Field(
        0.1, gt=0, lt=1, description="share of meanings held out for validation, by subset_seed"
    )
    length: int = Field(
        96, ge=8, le=8192, description="most tokens of a row; a longer response loses its end"
    )
    prompt_length: int = Field(
        48, ge=1, le=8192, description="most tokens of a prompt; a longer one loses its beginning"
    )


class E2E(DataSet[E2EOptions]):
    """The development and test files of the E2E challenge (Novikova et al. 2017).

    Columns `mr` (the meaning) and `ref`. Splits hold different meanings: no prompt of the test
    occurs in train. A meaning's references, two to forty of them, stand in the same split.
    """

    name = "e2e_nlg"
    title = "9,365 descriptions of restaurants for 1,177 sets of facts"
    tasks = ("text-generation",)
    licence = "CC BY-SA 4.0"
    source = "github.com/tuetschek/e2e-dataset"
    files = ("e2e_nlg/devset.csv.gz", "e2e_nlg/testset_w_refs.csv.gz")
    editions: ClassVar = {}
    rows: ClassVar = {}
    get = "with a network each file is downloaded on first use"

    Options = E2EOptions

    def open(self, options: E2EOptions, seed: int) -> Splits:
        """Splits "train", "val" and "test"; see `data/prompt_rows.py` for the views."""
        paths = _files(options)
        pairs = [pair for path in paths for pair in read(path)]
        digest = hashlib.sha256("".join(map(content_hash, paths)).encode()).hexdigest()
        held = by_prompt(
            with_references(pairs),
            {"test": options.test, "val": options.validation},
            seed=options.subset_seed,
            name=self.name,
        )
        told = "+".join(options.parts) if options.path is None else str(options.path)
        meanings = {role: len({pair.prompt for pair in rows}) for role, rows in held.items()}
        counts = ", ".join(f"{count} {role}" for role, count in meanings.items())
        return prompt_splits(
            self, held, options, digest=digest, edition=told, told=f"meanings: {counts}"
        )


def by_prompt(
    pairs: Sequence[Pair], shares: dict[str, float], *, seed: int, name: str
) -> dict[str, list[Pair]]:
    """Pairs by split, those of one prompt together.

    Args:
        pairs: of all.
        shares: split to its share of the prompts; the rest is "train".
        seed: of the draw.
        name: of the data, for the error.

    Raises:
        DataError: a split would hold no prompt.
    """
    different = list(dict.fromkeys(pair.prompt for pair in pairs))
    order = torch.randperm(len(different), generator=generator(seed, "prompts")).tolist()
    role_of: dict[str, str] = {}
    start = 0
    for role, share in shares.items():
        stop = start + max(1, round(len(different) * share))
        role_of.update({different[at]: role for at in order[start:stop]})
        start = stop
    found: dict[str, list[Pair]] = {"train": [], **{role: [] for role in shares}}
    for pair in pairs:
        found[role_of.get(pair.prompt, "train")].append(pair)
    lacking = [role for role, rows in found.items() if not rows]
    if lacking:
        raise DataError(
            f"{name} has {len(different)} different prompts: none is left for {lacking[0]}"
        )
    return found


def read(path: Path) -> list[tuple[str, str]]:
    """Meaning and reference of every row of a file, in order.

    Raises:
        DataError: damaged, or of other columns; names the line.
    """
    reader = csv.DictReader(io.StringIO(content_of(path), newline=""))
    lacking = {"mr", "ref"} - set(reader.fieldnames or ())
    if lacking:
        raise DataError(f"{path}: the first line must name the columns mr and ref")
    found = []
    for row in reader:
        meaning, reference = (" ".join((row[key] or "").split()) for key in ("mr", "ref"))
        if not meaning or not reference:
            raise DataError(f"{path}, line {reader.line_num}: the meaning or the text is empty")
        found.append((meaning, reference))
    if not found:
        raise DataError(f"{path} is empty: it holds no rows")
    return found


def _files(options: E2EOptions) -> list[Path]:
    if options.path is not None:
        from stillhouse.data.roots import locate

        folder = locate(options.path, option="path", folder=True)
        files = sorted(p for p in folder.iterdir() if p.name.endswith((".csv", ".csv.gz")))
        if not files:
            raise DataError(f"data option 'path': {folder} holds no .csv or .csv.gz file")
        return files
    return [_published(part) for part in options.parts]


def _published(part: Part) -> Path:
    name = _NAMES[part]

    def fetch(scratch: Path, target: Path) -> None:
        download_file(f"{_RAW}{name}.csv", scratch / "raw.csv")
        read(scratch / "raw.csv")
        # Without a time in the header, so that the same content gives the same file.
        target.write_bytes(gzip.compress((scratch / "raw.csv").read_bytes(), mtime=0))

    own = type("E2EPart", (E2E,), {"files": (f"e2e_nlg/{name}.csv.gz",)})()
    return found_or_fetched(own, fetch)
