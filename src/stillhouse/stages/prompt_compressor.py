"""A token classifier as a prompt compressor: the predictor that `infer` and Python call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.artifact import Predictor
from stillhouse.errors import DataError, MissingExtra, ModelError, RecipeError, nearest
from stillhouse.models.loading import find_folder, load_model
from stillhouse.net import Net
from stillhouse.parts.prompt_compression import (
    Compressed,
    Compression,
    ReleasedRoute,
    Route,
    ScoredWord,
    SurfaceRoute,
    SurfaceWindow,
    compress,
    probabilities_of,
    style_of,
)
from stillhouse.parts.text_reader import PieceReader, TextReader
from stillhouse.parts.text_spans import count_tokens
from stillhouse.tasks.token_classification import TagNet

_PLACEHOLDERS = tuple(f"[NEW{number}]" for number in range(100))


def reader_of(module: nn.Module, tokenizer: str, length: int) -> TextReader:
    """How a tagger reads text: by itself, or with its tokenizer.

    Args:
        module: the tagger; one with a `reader` brings its own.
        tokenizer: hub id or folder of the tokenizer, for other modules.
        length: pieces of a row, at most what the module has positions for.

    Raises:
        ModelError: there is no tokenizer.
        MissingExtra: transformers is not installed.
    """
    own = getattr(module, "reader", None)
    if own is not None:
        found: TextReader = own
        return found
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtra("transformers", "language", "to tokenise text") from error
    place = str(find_folder(tokenizer) or tokenizer)
    try:
        loaded = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{type(module).__name__} needs the tokenizer of '{tokenizer}', which cannot be "
            f"loaded: {error}"
        ) from error
    config = getattr(module, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    offset = 2 if getattr(config, "model_type", "").endswith("roberta") else 0
    return PieceReader(loaded, min(length, most - offset) if most else length)


class PromptCompressor(Predictor):
    """Shortens prompts to the words that matter.

    Settings: "tokenizer" (hub id or folder), "length", "batch", and defaults for "rate" and
    "released".
    """

    reads: ClassVar[str] = "text: .txt files, or .jsonl lines with 'text' or 'contexts'"
    writes: ClassVar[str] = "jsonl, or txt with the compressed prompts alone"
    options: ClassVar[Mapping[str, str]] = {
        "rate": "share of tokens to keep (default: the artifact's, 0.5)",
        "target_token": "tokens to keep, in place of rate",
        "select": "percentile (released rule) or exact (most probable words that fit)",
        "token_to_word": "mean or first: a word's probability from its pieces'",
        "force_tokens": "list of words that are always kept, such as ['\\n', '.', '?']",
        "force_reserve_digit": "keep every word with a digit",
        "drop_consecutive": "drop a forced word that repeats the last one",
        "chunk_end_tokens": "list of tokens behind which windows end",
        "use_context_level_filter": "drop whole contexts first",
        "use_token_level_filter": "then drop words (default true)",
        "target_context": "contexts to keep",
        "context_level_rate": "share of contexts to keep",
        "context_level_target_token": "tokens the kept contexts may hold",
        "force_context_ids": "numbers of contexts that are always kept",
        "released": "the released way: tokenise, detokenise, merge",
        "released_specials": "with released: [CLS] and [SEP] whatever the encoder (default true)",
        "labels": "give every word with its flag",
        "counter": "what counts tokens: estimate (default), encoder, or tiktoken:MODEL",
    }

    def __init__(self, module: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(module, settings)
        self.net = module if isinstance(module, TagNet) else TagNet(_inner(module))
        self.net.eval()
        self.module = self.net
        self.settings.setdefault("length", 512)
        self.settings.setdefault("rate", 0.5)
        if hasattr(self.net.module, "causal"):
            self.net.module.causal = bool(self.settings.get("causal", False))  # type: ignore[assignment]
        self._reader: TextReader | None = None
        self._released: Any = None

    @classmethod
    def from_pretrained(cls, name: str, **settings: Any) -> PromptCompressor:
        """A token classifier of Hugging Face as a compressor, such as `microsoft/llmlingua-2-*`.

        Args:
            name: hub id or folder; its second class means "keep".
            settings: see the class.
        """
        module = load_model(
            f"hf:{name}",
            options={"task": "token-classification", "num_labels": 2},
            weights="pretrained",
        )
        return cls(TagNet(module), {"tokenizer": name, **settings})

    @property
    def reader(self) -> TextReader:
        """How the model reads text."""
        if self._reader is None:
            name, length = str(self.settings.get("tokenizer", "")), int(self.settings["length"])
            self._reader = reader_of(self.net.module, name, length)
        return self._reader

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
        """Compress prompts.

        Args:
            inputs: each a text, or a list of contexts.
            options: see `options`.

        Returns:
            Per input {"compressed_prompt", "compressed_prompt_list", "origin_tokens",
            "compressed_tokens", "ratio", "rate"}, and "labels" ([word, flag]) when asked.

        Raises:
            RecipeError: an option out of range.
        """
        labels = bool(options.pop("labels", False))
        released = bool(options.pop("released", self.settings.get("released", False)))
        specials = bool(options.pop("released_specials", True))
        count = self._counter(str(options.pop("counter", "estimate")))
        settings = compression_of({"rate": self.settings["rate"], **options})
        prompts = [[entry] if isinstance(entry, str) else list(entry) for entry in inputs]
        route: Route[Any] = (
            self._released_route(settings, specials)
            if released
            else _Prepared(SurfaceRoute(self.reader, self._score_rows, settings), prompts)
        )
        found = [compress(prompt, route, settings, count) for prompt in prompts]
        return [_answer(one, labels) for one in found]

    def _counter(self, name: str) -> Callable[[str], int]:
        """What counts the tokens of a text.

        Raises:
            RecipeError: no such counter.
            MissingExtra: tiktoken is not installed.
        """
        if name == "estimate":
            return count_tokens
        if name == "encoder":
            return lambda text: len(self.reader.read(text).offsets)
        kind, _, model = name.partition(":")
        if kind != "tiktoken" or not model:
            raise RecipeError(
                f"counter is estimate, encoder or tiktoken:MODEL (such as tiktoken:gpt-4), "
                f"got {name!r}"
            )
        try:
            tiktoken = import_module("tiktoken")
        except ImportError as error:
            raise MissingExtra("tiktoken", "language", "to count tokens") from error
        encoding = tiktoken.encoding_for_model(model)
        return lambda text: len(encoding.encode(text, disallowed_special=()))

    def word_scores(self, texts: Sequence[str]) -> list[list[float]]:
        """Keep probability of every word of `split_words`, per text."""
        route = SurfaceRoute(self.reader, self._score_rows, Compression())
        prepared = _Prepared(route, [texts])
        return [
            [word.probability for words in prepared.score(prepared.windows(text)) for word in words]
            for text in texts
        ]

    def _score_rows(self, rows: Sequence[Tensor]) -> list[list[float]]:
        """Keep probability of each piece; similar lengths go together."""
        lead, size = self.reader.lead, int(self.settings.get("batch", 50))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: list[list[float]] = [[] for _ in rows]
        device = next((p.device for p in self.net.parameters()), torch.device("cpu"))
        for start in range(0, len(order), size):
            part = order[start : start + size]
            framed = self.reader.join([self.reader.row(rows[i]) for i in part])
            with torch.inference_mode():
                out = self.net(framed.to(device, non_blocking=True))
            for i, own in zip(part, probabilities_of(out["logits"]).tolist()):
                found[i] = own[lead : lead + len(rows[i])]
        return found

    # As released ---------------------------------------------------------------------

    def _released_route(self, settings: Compression, specials: bool) -> ReleasedRoute:
        tokenizer = self._placeholders()
        return ReleasedRoute(
            tokenizer,
            self._score_ids,
            settings,
            style=style_of(tokenizer),
            special=set(tokenizer.all_special_tokens) - set(_PLACEHOLDERS),
            placeholders=_PLACEHOLDERS,
            length=int(self.reader.length),
            opening="[CLS]" if specials else tokenizer.cls_token,
            closing="[SEP]" if specials else tokenizer.sep_token,
        )

    def _placeholders(self) -> Any:
        """A copy of the tokenizer that knows the placeholders; the model gets rows for them."""
        if self._released is None:
            if not isinstance(self.reader, PieceReader):
                raise RecipeError(
                    f"{type(self.net.module).__name__} has no Hugging Face tokenizer; the "
                    "released way needs one: leave out released"
                )
            from transformers import AddedToken

            tokenizer = deepcopy(self.reader.tokenizer)
            tokenizer.add_tokens([AddedToken(t, special=True) for t in _PLACEHOLDERS])
            self._released = tokenizer
        return self._released

    def _score_ids(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Keep probability of each id; ids beyond the vocabulary are the unknown one.

        The released code adds untrained rows to the embedding for its placeholders; forced
        words have probability 1 whatever the model says, so the unknown id serves as well.
        """
        assert isinstance(self.reader, PieceReader)
        size, unknown = int(self.settings.get("batch", 50)), self.reader.tokenizer.unk_token_id
        limit = self.net.module.get_input_embeddings().num_embeddings  # type: ignore[operator]
        device = next(self.net.parameters()).device
        found: list[list[float]] = []
        for start in range(0, len(rows), size):
            part = [
                torch.tensor([i if i < limit else unknown for i in row])
                for row in rows[start : start + size]
            ]
            ids = self.reader.join(part)
            mask = torch.zeros_like(ids)
            for row, own in enumerate(part):
                mask[row, : len(own)] = 1
            with torch.inference_mode():
                out = self.net.module(input_ids=ids.to(device), attention_mask=mask.to(device))
            values = probabilities_of(out.logits).tolist()
            found += [own[: len(row)] for own, row in zip(values, part)]
        return found

    def infer(
        self, inputs: Sequence[Path], output: Path | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Compress .txt files (one prompt each) and the lines of .jsonl files."""
        names, prompts = read_prompts(inputs)
        found = self.predict(prompts, **dict(options))
        if output is not None:
            write_answers(Path(output), names, found)
        before = sum(one["origin_tokens"] for one in found)
        after = sum(one["compressed_tokens"] for one in found)
        return {
            "prompts": len(found),
            "origin_tokens": before,
            "compressed_tokens": after,
            "ratio": f"{before / after:.1f}x" if after else "all is gone",
            "output": str(output) if output is not None else None,
            **({} if output is not None else {"rows": found}),
        }


def _inner(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, Net) else module


class _Prepared(SurfaceRoute):
    """A route whose windows were cut and scored for all prompts at once, in full batches."""

    def __init__(self, route: SurfaceRoute, prompts: Sequence[Sequence[str]]) -> None:
        super().__init__(route.reader, route.score_rows, route.settings)
        contexts = dict.fromkeys(context for prompt in prompts for context in prompt)
        self._windows = {context: route.windows(context) for context in contexts}
        flat = [window for windows in self._windows.values() for window in windows]
        self._scored = {id(w): words for w, words in zip(flat, route.score(flat), strict=True)}

    def windows(self, context: str) -> list[SurfaceWindow]:
        """Cut before."""
        return self._windows[context]

    def score(self, windows: Sequence[SurfaceWindow]) -> list[list[ScoredWord]]:
        """Scored before."""
        return [self._scored[id(window)] for window in windows]


def compression_of(options: Mapping[str, Any]) -> Compression:
    """Settings from plain values, as `infer -o` gives them.

    Raises:
        RecipeError: an option of a wrong type.
    """
    given = dict(options)
    known = {f.name: f for f in fields(Compression)}
    for name, value in given.items():
        if name not in known:
            raise RecipeError(f"a compression has no option '{name}'{nearest(name, known)}")
        default = getattr(Compression(), name)
        if isinstance(default, bool) and not isinstance(value, bool):
            raise RecipeError(f"the option '{name}' is true or false, got {value!r}")
        if isinstance(default, tuple) and isinstance(value, (str, int)):
            given[name] = [value]
        if name in _NUMBERS and value is not None and not isinstance(value, (int, float)):
            raise RecipeError(f"the option '{name}' is a number, got {value!r}")
    return Compression(**given)


_NUMBERS = frozenset(
    ("rate", "target_token", "target_context", "context_level_rate", "context_level_target_token")
)


def _answer(one: Compressed, labels: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "compressed_prompt": one.text,
        "compressed_prompt_list": one.contexts,
        "origin_tokens": one.origin_tokens,
        "compressed_tokens": one.compressed_tokens,
        "ratio": one.ratio,
        "rate": one.rate,
    }
    if labels:
        found["labels"] = [[word, int(flag)] for word, flag in one.words]
    return found


def read_prompts(inputs: Sequence[Path]) -> tuple[list[str], list[Any]]:
    """Names and prompts of files and folders.

    Raises:
        DataError: nothing to read, or a line without text.
    """
    names: list[str] = []
    prompts: list[Any] = []
    files = [f for p in map(Path, inputs) for f in (sorted(p.rglob("*")) if p.is_dir() else [p])]
    for file in files:
        if file.suffix == ".txt":
            names.append(str(file))
            try:
                prompts.append(file.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{file} is no text in UTF-8: {error}") from error
        elif file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    try:
                        entry = json.loads(line)
                        prompt = entry.get("contexts") or entry["text"]
                    except (ValueError, KeyError, AttributeError) as error:
                        raise DataError(
                            f"{file}, line {number}: an object with 'text' or 'contexts' is "
                            f"needed ({error})"
                        ) from error
                    names.append(f"{file}:{number}")
                    prompts.append(prompt)
    if not prompts:
        raise DataError("nothing to read: no .txt or .jsonl file was found")
    return names, prompts


def write_answers(output: Path, names: Sequence[str], found: Sequence[Mapping[str, Any]]) -> None:
    """Write answers as JSONL, or the compressed prompts alone to a .txt file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8") as file:
        for name, one in zip(names, found, strict=True):
            if output.suffix == ".txt":
                file.write(str(one["compressed_prompt"]) + "\n")
            else:
                file.write(json.dumps({"input": name, **one}, ensure_ascii=False) + "\n")
