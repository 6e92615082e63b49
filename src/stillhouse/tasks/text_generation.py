"""Text generation: a response to a prompt, token by token."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.artifact import Predictor
from stillhouse.batch import Batch, Splits, Subset, read_rows
from stillhouse.clock import seed_of, uniform_of
from stillhouse.errors import DataError, ModelError, RecipeError, VocabularyError
from stillhouse.losses.chunked import wide
from stillhouse.metrics.text_overlap import overlap
from stillhouse.metrics.token_loss import TokenLoss
from stillhouse.models.causal_lm import LanguageNet, Vocabulary, head_size, merged
from stillhouse.net import Net, Output
from stillhouse.parts.text_lines import json_lines, kind_of, numbered_lines, prompt_of
from stillhouse.parts.text_sampler import TextSampler, context_of
from stillhouse.parts.text_tokens import TextTokens, load_tokenizer, refuse_other_tokens
from stillhouse.parts.token_rows import padded, predicting, prompts, response_items, responses
from stillhouse.task import Metric, Task

_LOGITS = 1 << 24  # numbers of one batch's logits while a split is judged
_SHOWN = 8  # prompts whose answers the report shows


class TextGeneration(Task):
    """A response to each prompt.

    Batches are rows of tokens as `parts/token_rows.py` describes them, and the strings "prompt",
    "response" and "references" (a list of strings a row). `about` of the splits holds "reader",
    the `TextTokens` they were made by.

    Attributes:
        tokens: the data's tokenizer.
        vocabulary: the ids that all models of the run have.
    """

    name: ClassVar[str] = "text-generation"
    main_metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    ragged: ClassVar[bool] = True

    def __init__(self, splits: Splits) -> None:
        super().__init__(splits)
        found = self.about.get("reader")
        if not isinstance(found, TextTokens):
            raise DataError(
                f"the data '{splits.edition}' is not made of prompts and responses as tokens; "
                "data sets for text-generation are e2e_nlg and prompt_responses (your own jsonl)"
            )
        self.tokens: TextTokens = found
        self.vocabulary = Vocabulary(found.size)
        row = max(1, found.size * int(self.about["input"]["length"]))
        # As many rows as their logits fit into 64 MB, where 256 are more.
        self.evaluation_batch = max(1, min(256, _LOGITS // row))  # type: ignore[misc]

    def net(self, module: nn.Module, taps: Mapping[str, str] | None = None) -> Net:
        """Wrap a causal language model; one without a tokenizer of its own reads the data's."""
        made = LanguageNet(module, shared=self.vocabulary, taps=taps)
        if getattr(module, "tokenizer_at", None) is None:
            made.tokens = self.tokens
        return made

    def views(self) -> Sequence[str]:
        """Rows of tokens."""
        return ("tokens",)

    def loss(self, out: Output, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy of the response's tokens, the mean over those of the batch."""
        logits, tokens = response_items(out["logits"], batch)
        return {"task": F.cross_entropy(wide(logits), tokens)}

    def count(self, batch: Batch) -> int | Tensor:
        """Response tokens."""
        return responses(batch)

    def items(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, L) the positions whose logits speak of a response token."""
        return predicting(batch["response_mask"])

    def metrics(self) -> Mapping[str, Metric]:
        """Loss, perplexity and accuracy of response tokens."""
        return {"tokens": TokenLoss()}

    def example_view(self, view: str = "x") -> Any:
        """One row of the training data."""
        batch = self.first_rows(1)
        return batch["tokens"] if view == "x" else batch.view(view)

    # -- models ------------------------------------------------------------------------------

    def check(self, student: Net | None, teacher: Net | None) -> None:
        """Refuse models of another vocabulary, and those that cannot read the rows."""
        for role, net in (("student", student), ("teacher", teacher)):
            if net is not None:
                self._check_net(role, net)

    def _check_net(self, role: str, net: Net) -> None:
        if not isinstance(net, LanguageNet):
            raise ModelError(f"the {role} {type(net.module).__name__} is no causal language model")
        name, size = type(net.module).__name__, head_size(net.module)
        net.share(self.vocabulary)
        batch = self.first_rows(64)
        self._check_tokens(f"{role} {name}", net, batch)
        largest = int(batch["tokens"].max())
        if size is not None and largest >= size:
            raise VocabularyError(
                f"the {role} {name} has {size} token ids and the data uses id {largest}: it was "
                f"made for another tokenizer than {self.tokens.name}"
            )
        context, length = context_of(net), int(self.about["input"]["length"])
        if context is not None and context < length:
            raise ModelError(
                f"the {role} {name} reads rows of {context} tokens, the data has up to {length}: "
                f"set data.options.length to {context} or less"
            )
        self._try(f"{role} {name}", net, batch["tokens"][:2])

    def _check_tokens(self, whose: str, net: LanguageNet, batch: Batch) -> None:
        theirs = net.tokens.tokenizer if net.tokens is not None else None
        place = getattr(net.module, "tokenizer_at", None)
        if theirs is None and place is not None:
            try:
                theirs = load_tokenizer(str(place))
            except ModelError:
                return  # weights without a tokenizer beside them: their ids are the user's word
        if theirs is not None and theirs is not self.tokens.tokenizer:
            texts = [*batch["prompt"], *batch["response"]]
            size = self.vocabulary.size
            refuse_other_tokens(self.tokens.tokenizer, theirs, texts, size=size, whose=whose)

    def check_apart(self, net: Net, template: str | None = None) -> None:
        """Have a teacher read the texts by its own tokenizer; refuse one that cannot.

        Args:
            net: from here on it shares no ids with the other models, see `LanguageNet.apart`.
            template: of its prompts; None: as it was trained, or the prompt and a new line.

        Raises:
            ModelError: no causal language model, no tokenizer, or texts beyond its context.
        """
        name = type(net.module).__name__
        if not isinstance(net, LanguageNet):
            raise ModelError(f"the teacher {name} is no causal language model")
        tokens = net.reader(template)
        if tokens is None:
            raise ModelError(
                f"the teacher {name} comes without a tokenizer, so it cannot read text: give a "
                "folder or hub id that has one (hf:), an artifact, or train it on data of its own "
                "(teacher: train: data)"
            )
        net.set_apart(tokens)
        batch = self.first_rows(64)
        asked, said = tokens.prompts(batch["prompt"]), tokens.responses(batch["response"])
        rows = [torch.tensor([*a, *b]) for a, b in zip(asked, said, strict=True)]
        longest, largest = max(map(len, rows)), max(int(row.max()) for row in rows)
        context, size = context_of(net), head_size(net.module)
        if size is not None and largest >= size:
            raise VocabularyError(
                f"the teacher {name} has {size} token ids and its tokenizer {tokens.name} gives "
                f"id {largest}: it belongs to another model"
            )
        if context is not None and context < longest:
            raise ModelError(
                f"the teacher {name} reads rows of {context} tokens, and texts of the data have "
                f"{longest} by its tokenizer {tokens.name}: take a teacher with a longer context "
                "(teacher: train: data: options: length)"
            )
        self._try(f"teacher {name}", net, padded(rows[:2], padding=tokens.padding)[0])

    def _try(self, whose: str, net: LanguageNet, tokens: Tensor) -> None:
        try:
            logits = net.tried(tokens).get("logits")
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ModelError(f"the {whose} cannot read rows of tokens: {error}") from error
        if logits is None or logits.shape[:2] != tokens.shape or logits.ndim != 3:
            found = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise ModelError(
                f"the {whose} gives {found} for rows of shape {tuple(tokens.shape)}; a causal "
                "language model gives (rows, tokens, vocabulary)"
            )

    # -- generation --------------------------------------------------------------------------

    def sampler(
        self, max_new: int = 0, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
    ) -> TextSampler:
        """A sampler that ends and pads as the data does.

        Args:
            max_new: most new tokens; 0 for as many as the data's options say.
            temperature: 0 for the most probable token.
            top_p: see `TextSampler`.
            top_k: see `TextSampler`.
        """
        return TextSampler(
            max_new or self.new_tokens,
            end=self.tokens.end,
            padding=self.tokens.padding,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
        )

    @property
    def new_tokens(self) -> int:
        """Most tokens of a generated response."""
        return int(self.about["generation"]["new_tokens"])

    def generate(
        self, net: nn.Module, batch: Batch, sampler: TextSampler, *, seed: int = 0
    ) -> list[str]:
        """Responses of a net to the prompts of a batch.

        Args:
            net: of this task; one that stands apart reads and writes by its own tokenizer.
            batch: rows of tokens.
            sampler: see `sampler`.
            seed: with a row's id what its sample depends on.
        """
        device = next((p.device for p in net.parameters()), torch.device("cpu"))
        tokens = self.tokens
        asked, mask = prompts(batch)
        if isinstance(net, LanguageNet) and net.apart and net.tokens is not None:
            tokens = net.tokens
            rows = [torch.tensor(row) for row in tokens.prompts(batch["prompt"])]
            asked, mask = padded(rows, padding=tokens.padding, left=True)
            room = self._room(tokens, sampler.max_new)
            sampler = sampler.ending(tokens.end, tokens.padding, room)
        chance = uniform_of(seed, batch["id"], 0, sampler.max_new) if sampler.temperature else None
        ids, said = sampler(net, asked.to(device), mask.to(device), chance)
        return tokens.texts(ids, said)

    def _room(self, tokens: TextTokens, count: int) -> int:
        """How many tokens of another tokenizer say what `count` of the data's can."""
        said = self.first_rows(64)["response"]
        lengths = zip(self.tokens.responses(said), tokens.responses(said), strict=True)
        return math.ceil(count * max(len(theirs) / len(ours) for ours, theirs in lengths))

    def judge(self, job: Any, model: nn.Module, split: str = "test") -> dict[str, float]:
        """Loss; overlap with the references of what is generated for every prompt of a split.

        Greedy, and sampled at temperature 1 where the data's options say so: the figures of
        samples begin with "sampled_" and are means over the draws. A net that stands apart has no
        loss here: a loss is of tokens, and its tokens are others.
        """
        apart = isinstance(model, LanguageNet) and model.apart
        figures: dict[str, float] = {} if apart else dict(job.evaluate(model, split))
        source = asked_once(job.splits[split])
        answers, references = self._answers(job, model, source, 0.0, 0)
        figures.update(overlap(answers, references))
        draws = int(self.about["generation"]["draws"])
        for draw in range(draws):
            answers, references = self._answers(job, model, source, 1.0, draw)
            for name, value in overlap(answers, references).items():
                key = f"sampled_{name}"
                figures[key] = figures.get(key, 0.0) + value / draws
        return figures

    def _answers(
        self, job: Any, model: nn.Module, source: Any, temperature: float, draw: int
    ) -> tuple[list[str], list[list[str]]]:
        sampler = self.sampler(temperature=temperature)
        answers, references = list[str](), list[list[str]]()
        for rows in torch.split(torch.arange(len(source)), 256):
            batch = read_rows(source, rows, None, self.collate)
            seed = seed_of(job.seed, "judge", draw)
            answers += self.generate(model, batch, sampler, seed=seed)
            references += batch["references"]
        return answers, references

    def details(self, job: Any, artifact: Any, teacher: Net | None) -> dict[str, Any]:
        """What student and teacher say to some prompts of the test."""
        if artifact.predictor is None:
            return {}
        source = asked_once(job.splits["test" if "test" in self.splits else "val"])
        spread = torch.linspace(0, len(source) - 1, min(_SHOWN, len(source))).long()
        batch = read_rows(source, spread, None, self.collate)
        columns = {
            "prompt": batch["prompt"],
            "a reference": batch["response"],
            "student": self.generate(artifact.module, batch, self.sampler(temperature=0.0)),
            "student, sampled": self.generate(
                artifact.module, batch, self.sampler(), seed=seed_of(job.seed, "shown")
            ),
        }
        if teacher is not None:
            columns["teacher"] = self.generate(teacher, batch, self.sampler(temperature=0.0))
        table = {
            "title": "What is said to prompts of the test",
            "columns": list(columns),
            "rows": [list(row) for row in zip(*columns.values(), strict=True)],
            "caption": "The most probable token each time, except where sampled (temperature 1).",
        }
        return {"tables": [table]}

    def predictor(self, net: Net) -> Predictor:
        """Answers to prompts; adapters are merged into the weights."""
        plain = merged(net.module)
        if plain is not net.module:
            net = LanguageNet(plain, shared=self.vocabulary)
        told = {k: self.about["generation"][k] for k in ("new_tokens", "prompt_length")}
        return TextWriter(net, {"tokens": self.tokens.settings(), **told})


def asked_once(source: Any) -> Any:
    """The rows of a source with different prompts: the first of each.

    Args:
        source: with `pairs`, or a subset of one; others are read.
    """
    first: dict[str, int] = {}
    for start in range(0, len(source), 1024):
        rows = torch.arange(start, min(start + 1024, len(source)))
        for place, text in zip(rows.tolist(), read_rows(source, rows, None)["prompt"]):
            first.setdefault(text, place)
    return Subset(source, torch.tensor(list(first.values())))


class TextWriter(Predictor):
    """Answers prompts."""

    reads: ClassVar[str] = "prompts: text lines, or jsonl with a field prompt"
    writes: ClassVar[str] = "jsonl: prompt and text"
    options: ClassVar[Mapping[str, str]] = {
        "max_new": "most new tokens",
        "temperature": "0 (default) for the most probable token each time",
        "top_p": "draw from the smallest set of tokens with this probability (default 1)",
        "top_k": "draw from so many most probable tokens (default 0: all)",
        "seed": "of the samples (default 0)",
        "batch": "prompts at a time (default 64)",
    }

    def __init__(self, module: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(module, settings)
        self.reader = self.tokens = TextTokens.restore(self.settings["tokens"])

    @classmethod
    def restore(cls, module: nn.Module, settings: Mapping[str, Any]) -> Predictor:
        """The inverse of saving: the model as a net of its own vocabulary."""
        inner = module.module if isinstance(module, Net) else module
        made = cls(LanguageNet(inner), settings)
        net = made.module
        assert isinstance(net, LanguageNet)
        net.tokens = made.tokens
        net.share(Vocabulary(made.tokens.size))
        return made

    def files(self) -> dict[str, bytes]:
        """The tokenizer as transformers reads it."""
        return self.tokens.files()

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[str]:
        """Responses to prompts.

        Args:
            inputs: strings.
            options: see `options`.

        Raises:
            RecipeError: an option that is none, or out of range.
        """
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            raise RecipeError(f"there is no option '{unknown[0]}'; options: {[*self.options]}")
        sampler = TextSampler(
            int(options.get("max_new", self.settings["new_tokens"])),
            end=self.tokens.end,
            padding=self.tokens.padding,
            temperature=float(options.get("temperature", 0.0)),
            top_p=float(options.get("top_p", 1.0)),
            top_k=int(options.get("top_k", 0)),
        )
        size, seed = int(options.get("batch", 64)), int(options.get("seed", 0))
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        found: list[str] = []
        for start in range(0, len(inputs), size):
            texts = [str(text) for text in inputs[start : start + size]]
            asked = self.tokens.prompts(texts, self.settings["prompt_length"])
            rows = [torch.tensor(row) for row in asked]
            ids, mask = padded(rows, padding=self.tokens.padding, left=True)
            places = torch.arange(start, start + len(texts))
            chance = uniform_of(seed_of(seed, "write"), places, 0, sampler.max_new)
            new, said = sampler(
                self.module, ids.to(device), mask.to(device), chance.to(device)
            )  # fmt: skip
            found += self.tokens.texts(new, said)
        return found

    def infer(
        self, inputs: Sequence[Path], output: Path | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Answer the lines of text files, or the prompts of jsonl files."""
        texts = [text for path in map(Path, inputs) for text in _prompts(path)]
        if not texts:
            raise DataError("nothing to read: no prompt was found")
        rows = [
            {"prompt": prompt, "text": text}
            for prompt, text in zip(texts, self.predict(texts, **dict(options)), strict=True)
        ]
        if output is not None:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(output).write_text("".join(lines), encoding="utf-8")
        return {"inputs": len(rows), "output": str(output) if output else None, "rows": rows}


def _prompts(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path} is no file of prompts")
    if kind_of(path) != ".jsonl":
        return [line for _, line in numbered_lines(path)]
    return [prompt_of(entry, None, f"{path}, line {number}") for number, entry in json_lines(path)]
