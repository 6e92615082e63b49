"""A deterministic compressor that only deletes words: a stand-in for a large model.

It makes demonstrations and tests honest where no model can be downloaded: it knows nothing
of what is learnt from it. Several rules look at what stands to the RIGHT of a word, so a
reader that sees only the left cannot imitate it. A share of its output breaks the delete-only
rule, as that of real models does: words are inflected, invented, or said twice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

_TOKEN = re.compile(r"\w+(?:['’]\w+)?|[^\w\s]")
_TEXT = re.compile(r"<text>\s*(.*?)\s*</text>", re.DOTALL)


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


ARTICLES = _set("a an the")
PREPOSITIONS = _set(
    "of to in on at by for from with into onto over under about after before between during "
    "through against among within without upon near along across behind"
)
AUXILIARIES = _set(
    "is am are was were be been being has have had do does did will would shall should can "
    "could may might must"
)
FUNCTION_WORDS = _set(
    "and or but nor so yet as if than that which who whom whose this these those there here "
    "it its he she they them his her their him i me my we us our you your such some any each "
    "both either also too then thus hence when while where because since although though "
    "however therefore moreover furthermore indeed well"
)
FILLERS = _set(
    "very really quite rather just simply merely actually basically certainly perhaps maybe "
    "almost even still already often usually always sometimes"
)
COMMON_WORDS = _set(
    "all many much more most other others another same own few several lot lots part parts way "
    "ways time times thing things kind kinds make makes made making use uses used using get gets "
    "got give gives given go goes went come comes came take takes took taken see sees seen know "
    "known say says said like includes include including various different number numbers good "
    "great new old first second last next well want wants wanted need needs become became "
    "called based known"
)
NOT_ADVERBS = _set("family only early reply supply apply rely july italy ally assembly anomaly fly")


def compress(
    messages: Sequence[Mapping[str, str]],
    body: Mapping[str, Any],
    *,
    violations: float = 0.05,
    burst: float = 0.4,
    seed: int = 0,
) -> str:
    """Answer a chat request by compressing the text inside its `<text>` tags.

    Args:
        messages: of the request; the last one holds the text (all of it without tags).
        body: the whole request (unused: the rules do not sample).
        violations: share of kept words that break the delete-only rule.
        burst: how large that share is in the passages that hold violations; they come in
            bursts, as when a model rewrites a passage instead of shortening it.
        seed: of the violations, which are a function of (seed, text).
    """
    content = messages[-1].get("content", "") if messages else ""
    found = _TEXT.search(content)
    text = found.group(1) if found else content
    return shorten(text, violations=violations, burst=burst, seed=seed)


def shorten(text: str, *, violations: float = 0.0, burst: float = 0.4, seed: int = 0) -> str:
    """`text` without the words that `keep_flags` drops, with `violations` injected.

    Args:
        text: any text.
        violations: mean share of kept words that are replaced, in [0, 1].
        burst: share within an affected text, in (0, 1].
        seed: of the violations.
    """
    tokens = [m.group() for m in _TOKEN.finditer(text)]
    kept = [token for token, keep in zip(tokens, keep_flags(tokens)) if keep]
    chance = _Chance(seed, text)
    if violations and chance.next() < min(1.0, violations / burst):
        kept = [said for word in kept for said in _violate(word, burst, chance)]
    return _join(kept)


def keep_flags(tokens: Sequence[str]) -> list[bool]:
    """Which tokens stay, by rules without a dictionary of word classes.

    - an article goes only before a lower-case word;
    - a preposition goes unless a number or a capitalised word follows;
    - an auxiliary goes only before a form in -ing or -ed, or before an article;
    - pronouns, conjunctions, fillers, the commonest other words and adverbs in -ly go;
    - of several mentions of a name only the last stays;
    - a parenthesis goes, brackets and all, only if it holds no number;
    - quotation marks go; other punctuation, names, numbers and all other words stay.
    """
    dropped = _light_parentheses(tokens) | _earlier_mentions(tokens)
    return [i not in dropped and _stays(tokens, i) for i in range(len(tokens))]


def _stays(tokens: Sequence[str], i: int) -> bool:
    token = tokens[i]
    word = token.lower()
    following = tokens[i + 1] if i + 1 < len(tokens) else ""
    if word in ARTICLES:
        return not following[:1].islower()
    if word in PREPOSITIONS:
        return following[:1].isdigit() or following[:1].isupper()
    if word in AUXILIARIES:
        verb = following.endswith(("ing", "ed")) and following[:1].islower()
        return not (verb or following.lower() in ARTICLES)
    if word in FUNCTION_WORDS | FILLERS | COMMON_WORDS or token in {'"', "“", "”", "'", "`"}:
        return False
    return not (len(word) > 4 and word.endswith("ly") and word not in NOT_ADVERBS)


def _light_parentheses(tokens: Sequence[str]) -> set[int]:
    light: set[int] = set()
    opened: int | None = None
    for i, token in enumerate(tokens):
        if token == "(":
            opened = i
        elif token == ")" and opened is not None:
            inside = tokens[opened + 1 : i]
            if not any(c.isdigit() for word in inside for c in word):
                light.update(range(opened, i + 1))
            opened = None
    return light


def _earlier_mentions(tokens: Sequence[str]) -> set[int]:
    earlier: set[int] = set()
    last: dict[str, int] = {}
    for i, token in enumerate(tokens):
        common = token.lower() in ARTICLES | PREPOSITIONS | AUXILIARIES | FUNCTION_WORDS
        if not token[:1].isupper() or len(token) < 3 or common:
            continue
        if token in last:
            earlier.add(last[token])
        last[token] = i
    return earlier


class _Chance:
    """Uniform numbers that are a function of (seed, text, position)."""

    def __init__(self, seed: int, text: str) -> None:
        self._name = hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "replace")).digest()
        self._count = 0

    def next(self) -> float:
        self._count += 1
        name = self._name + self._count.to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") / 2.0**64


_INVENTED = ("significant", "overall", "notably", "context", "regarding", "various", "key")


def _violate(word: str, share: float, chance: _Chance) -> list[str]:
    """What is said for one kept word: itself, or one of three violations."""
    if not word[:1].isalpha() or chance.next() >= share:
        return [word]
    kind = chance.next()
    if kind < 0.5:
        return [_inflect(word)]
    if kind < 0.75:
        return [_INVENTED[int(chance.next() * len(_INVENTED))]]
    return [word, word]


def _inflect(word: str) -> str:
    for ending, other in (("ing", "ed"), ("ed", "ing"), ("s", ""), ("e", "ing")):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            return word[: -len(ending)] + other
    return word + "s"


def _join(words: Sequence[str]) -> str:
    text = " ".join(words)
    text = re.sub(r" ([.,;:!?)\]%])", r"\1", text)
    return re.sub(r"([(\[$]) ", r"\1", text)
