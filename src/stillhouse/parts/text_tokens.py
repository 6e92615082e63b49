"""From prompts and responses to the tokens of a causal language model, and back."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stillhouse.errors import DataError, MissingExtra, ModelError, VocabularyError

PADDING, END, BREAK, UNKNOWN = "<pad>", "<end>", "<break>", "<unk>"
CHAT = "chat"
# Where a word tokenizer's text is put together again: no blank before, none behind.
_NO_BLANK_BEFORE = re.compile(r"\s+([.,;:!?%)\]}]+|['’](?:s|t|re|ve|ll|d|m)\b|n['’]t\b)")
_NO_BLANK_BEHIND = re.compile(r"([(\[{£$€])\s+")
_WITHIN_WORDS = re.compile(r"(?<=\w)\s+(['’\-])\s+(?=\w)")


class TextTokens:
    """A tokenizer, and the form in which prompt and response become one row.

    A row is prompt, response, end token. Both sides are tokenised apart, so that a prompt has
    the same tokens whether it is learned from or gone on from.

    Args:
        tokenizer: of transformers.
        template: of the prompt, with `{prompt}` where its text goes; "chat" for the tokenizer's
            own form of what a user says; "" for the text followed by the tokenizer's break token
            (that of `word_tokenizer`) where it has one.
        name: of the tokenizer, for messages and records.

    Attributes:
        size: number of ids, added tokens included.
        end: id that ends a response.
        padding: id that fills rows; the end's where the tokenizer has none of its own.

    Raises:
        ModelError: the tokenizer has no token that could end a response, or no form of a chat.
    """

    def __init__(self, tokenizer: Any, *, template: str = "", name: str = "words") -> None:
        self.tokenizer, self.template, self.name = tokenizer, template, name
        self.size = len(tokenizer)
        if tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer {name} has no end token (eos_token)")
        if template == CHAT and not getattr(tokenizer, "chat_template", None):
            raise ModelError(f"the tokenizer {name} has no chat template: give template a text")
        self.end = int(tokenizer.eos_token_id)
        found = tokenizer.pad_token_id
        self.padding = self.end if found is None else int(found)
        self._break = tokenizer.get_vocab().get(BREAK)
        self._fingerprint = ""

    def __deepcopy__(self, memo: Any) -> TextTokens:
        return self

    @property
    def fingerprint(self) -> str:
        """Of the vocabulary, and of how text becomes ids."""
        if not self._fingerprint:
            told = [self.template, vocabulary_hash(self.tokenizer)]
            self._fingerprint = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        return self._fingerprint

    def prompt(self, text: str, most: int = 0) -> list[int]:
        """Ids of a prompt; of a longer one the last `most` (0 for all)."""
        return self.prompts([text], most)[0]

    def prompts(self, texts: Sequence[str], most: int = 0) -> list[list[int]]:
        """Ids of each prompt; see `prompt`."""
        found = []
        for ids in self._prompt_ids(texts):
            row = list(ids[:-1] if ids and ids[-1] == self.end else ids)
            if self._break is not None:
                row.append(self._break)
            found.append(row[-most:] if most else row)
        return found

    def _prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        if self.template == CHAT:
            turns = [[{"role": "user", "content": text}] for text in texts]
            texts = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        elif self.template:
            texts = [self.template.replace("{prompt}", text) for text in texts]
        # The form of a chat brings its own special tokens.
        own = self.template != CHAT
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=own).input_ids
        return found

    def response(self, text: str) -> list[int]:
        """Ids of a response, with the end token."""
        return self.responses([text])[0]

    def responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each response, with the end token."""
        found = self.tokenizer(list(texts), add_special_tokens=False).input_ids
        return [[*ids, self.end] for ids in found]

    def text(self, ids: Tensor | Sequence[int], mask: Tensor | None = None) -> str:
        """The text of one row's tokens, without special ones.

        Args:
            ids: (L,).
            mask: (L,) bool, which of them count.
        """
        if isinstance(ids, Tensor):
            ids = (ids if mask is None else ids[mask.bool()]).tolist()
        decoded = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return tidied(decoded) if self._break is not None else decoded.strip()

    def texts(self, ids: Tensor, mask: Tensor) -> list[str]:
        """The texts of rows (B, L) under their masks (B, L)."""
        return [self.text(row, kept) for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]

    # -- kept beside a model -------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Plain values from which `restore` makes the same again."""
        return {
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "special": self._special(),
            "chat": getattr(self.tokenizer, "chat_template", None) or "",
            "template": self.template,
            "name": self.name,
        }

    def _special(self) -> dict[str, str]:
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        found = {name: getattr(self.tokenizer, name, None) for name in names}
        return {name: str(token) for name, token in found.items() if token is not None}

    @classmethod
    def restore(cls, settings: Mapping[str, Any]) -> TextTokens:
        """The inverse of `settings`."""
        made = _fast(settings["tokenizer"], settings["special"])
        made.chat_template = settings.get("chat") or None
        return cls(made, template=settings["template"], name=settings["name"])

    def files(self) -> dict[str, bytes]:
        """The files that `AutoTokenizer.from_pretrained` reads, by name."""
        told = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special()}
        if getattr(self.tokenizer, "chat_template", None):
            told["chat_template"] = str(self.tokenizer.chat_template)
        return {
            "tokenizer.json": self.tokenizer.backend_tokenizer.to_str().encode(),
            "tokenizer_config.json": json.dumps(told, indent=1).encode(),
        }


def tidied(text: str) -> str:
    """Words joined by blanks as running text: no blank before a full stop."""
    text = _NO_BLANK_BEFORE.sub(r"\1", text)
    text = _NO_BLANK_BEHIND.sub(r"\1", text)
    return _WITHIN_WORDS.sub(r"\1", text).strip()


def word_tokenizer(texts: Iterable[str], *, least: int = 1) -> Any:
    """A tokenizer whose tokens are the words and marks of these texts.

    Args:
        texts: of the training data alone.
        least: how often a word occurs to become a token; rarer ones are the unknown token.

    Returns:
        A `PreTrainedTokenizerFast`; ids by falling frequency, ties in alphabetical order, behind
        the special tokens: padding, end, break between prompt and response, unknown.

    Raises:
        DataError: no word occurs that often.
        MissingExtra: tokenizers or transformers is not installed.
    """
    tokenizers = _tokenizers()
    cutter = tokenizers.pre_tokenizers.Whitespace()  # runs of letters and digits, runs of marks
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in cutter.pre_tokenize_str(text))
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    words = [word for word, count in ordered if count >= least]
    if not words:
        raise DataError(f"no word of the training texts occurs {least} times")
    special = [PADDING, END, BREAK, UNKNOWN]
    ids = {word: number for number, word in enumerate([*special, *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=UNKNOWN))
    made.pre_tokenizer = cutter
    made.add_special_tokens(special)
    return _fast(made.to_str(), {"pad_token": PADDING, "eos_token": END, "unk_token": UNKNOWN})


def bpe_tokenizer(texts: Iterable[str], *, merges: int = 1000) -> Any:
    """A byte-level BPE tokenizer learnt from these texts (Sennrich et al. 2016, Radford 2019).

    It can say any text: what is no merge remains bytes.

    Args:
        texts: of the training data alone.
        merges: most pairs that are joined, >= 0; fewer where no pair occurs twice any more.

    Returns:
        A `PreTrainedTokenizerFast`: padding, end, 256 bytes, then the merges in their order.

    Raises:
        MissingExtra: tokenizers or transformers is not installed.
    """
    tokenizers = _tokenizers()
    special = [PADDING, END]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    bytes_of = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(special) + len(bytes_of) + merges,
        min_frequency=2,
        initial_alphabet=sorted(bytes_of),
        special_tokens=special,
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return _fast(made.to_str(), {"pad_token": PADDING, "eos_token": END})


def _fast(text: str, special: Mapping[str, str]) -> Any:
    tokenizers = _tokenizers()
    made = tokenizers.Tokenizer.from_str(text)
    return _transformers().PreTrainedTokenizerFast(tokenizer_object=made, **special)


def load_tokenizer(name: str) -> Any:
    """A tokenizer by hub id or folder; what lies on this machine is taken first.

    Raises:
        ModelError: there is none, or it has no fast form.
        MissingExtra: transformers is not installed.
    """
    transformers = _transformers()
    extra = {}
    place = Path(name)
    if place.is_dir() and not (place / "config.json").exists():
        packed = sorted(place.glob("*.gguf"))
        extra = {"gguf_file": packed[0].name} if len(packed) == 1 else {}
    try:
        found = transformers.AutoTokenizer.from_pretrained(name, **extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        told = str(error).strip().splitlines()
        raise ModelError(f"no tokenizer at {name}: {told[0] if told else error!r}") from error
    if not getattr(found, "is_fast", False):
        raise ModelError(f"the tokenizer {name} has no fast form (tokenizer.json)")
    return found


# Whether two tokenizers mean the same by their ids ----------------------------------------


def vocabulary_hash(tokenizer: Any) -> str:
    """A hash of a tokenizer's tokens and ids, and of how it cuts."""
    words = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = "" if backend is None else backend.to_str()
    return hashlib.sha256((words + rules).encode("utf-8", "surrogatepass")).hexdigest()


def refuse_other_tokens(
    ours: Any, theirs: Any, texts: Sequence[str], *, size: int, whose: str
) -> None:
    """Refuse tokenizers that give equal strings other ids.

    Args:
        ours: the data's tokenizer.
        theirs: a model's.
        texts: strings of the data, on which both are tried.
        size: ids below it are what models are compared on.
        whose: for the message: "teacher gpt2".

    Raises:
        VocabularyError: a token, or a text, that the two map to other ids.
    """
    mine, other = ours.get_vocab(), theirs.get_vocab()
    advice = (
        "losses on logits need one vocabulary: take a teacher and a student of one family, and "
        "name its tokenizer in data.options.tokenizer"
    )
    for token, number in sorted(mine.items(), key=lambda pair: pair[1]):
        if number < size and token in other and other[token] != number:
            raise VocabularyError(
                f"the {whose} has another tokenizer than the data: '{token}' is id {number} "
                f"there, {other[token]} in the model's; {advice}"
            )
        if number < size and token not in other:
            raise VocabularyError(
                f"the {whose} has another tokenizer than the data: it does not know the token "
                f"'{token}' (id {number}); {advice}"
            )
    for text in texts:
        first, second = (t(text, add_special_tokens=False).input_ids for t in (ours, theirs))
        if list(first) != list(second):
            raise VocabularyError(
                f"the {whose} cuts text otherwise than the data's tokenizer: {text[:60]!r} becomes "
                f"{list(second)[:12]}, not {list(first)[:12]}; {advice}"
            )


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise MissingExtra("tokenizers", "language", "to make a tokenizer") from error
    return tokenizers


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "language", "to read text as tokens") from error
    return transformers
