r"""DAC-KL with multi-granularity semantic revision (MGSR; arXiv 2407.10068).

A language model is distilled on text it wrote itself and on given text, and the teaching signal is
revised at three granularities. With :math:`p_i`, :math:`q_i` the teacher's and the student's
distribution of token i of a response:

*Sequence* (SCRG). In a text sampled from the student, of the places where the teacher's likeliest
token is another one, the place :math:`j = \arg\max_i KL(p_i \| q_i)` gets the teacher's token; the
student samples again from j + 1. Everything before j stays. Repeated `scrg_rounds` times.

*Token* (DAC-KL). A small sub-network reads both distributions and chooses quantiles
:math:`(l_i, u_i)` of :math:`p_i`; matched is the band between them, always with the target:

.. math::
    L_{DAC} = \frac{1}{N} \sum_i \sum_{v \in S_i} \tilde p_i(v)
        \log\frac{\tilde p_i(v)}{\tilde q_i(v)},
    \qquad S_i = \{v : t_l \le p_i(v) \le t_u\} \cup \{y_i\}

*Span.* In spans of the decoded text (phrases), the products of neighbouring distributions are
matched: :math:`L_{span} = \frac{1}{M} \sum_k \| p_k \odot p_{k+1} - q_k \odot q_{k+1} \|_2^2`.

:math:`L = L_{SFT} + L_{DAC} + L_{span}`, the first on given responses only. Which text a step reads
is decided as in DistiLLM: own text with the probability of a threshold that rises with the
validation loss, of which a falling share is written anew and the rest drawn from a buffer of
earlier samples.

No code of the paper is released. Data flow, scheduler and buffer are those of DistiLLM
(jongwooko/distillm at d47e77f), the base it names, whose shift of generated labels by one and whose
forward KL without the teacher's entropy are not repeated. Reconstructed: the sub-network's inputs
and size, the logarithmic scale of quantiles, straight-through gates, renormalisation, the penalty
against a band that shrinks to one class, the direction of the token KL, the spans' distance.

*Another vocabulary* (`alignment: text`; experimental, the offer of our sheet and not the paper's).
All three terms compare distributions over the same ids, so a teacher of another vocabulary is
refused. On text two forms are left. The student's text is cut by the teacher's own tokenizer: in
SCRG the disputed *word* is that with the largest difference of log-likelihoods per character,
student less teacher, among those where the teacher, greedily, would say something else; the teacher
writes that word and no more, the student goes on. Tokens are matched at the places where both
tokenizers have a boundary in the text, by their k largest probabilities in falling order, as in
Universal Logit Distillation (arXiv 2402.12030):
:math:`L_{DAC} = \frac{1}{N} \sum_i \sum_{r \le k} |p_{i,(r)} - q_{i,(r)}|`. The span loss is
undefined there: a product of two distributions says which ids follow each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from stillhouse._version import __version__
from stillhouse.artifact import Artifact
from stillhouse.batch import Batch, Shuffled, read_rows
from stillhouse.clock import Clock
from stillhouse.data.prompt_rows import Pair, PromptRows
from stillhouse.engine.fitting import optimizer_of, steps_of
from stillhouse.errors import ModelError, VocabularyError
from stillhouse.losses.chunked import chunked, wide
from stillhouse.losses.clipped_kl import band_features, clipped_kl, mass_penalty
from stillhouse.losses.logits import kl, sorted_distance, topk_kl, total_variation
from stillhouse.losses.spans import pair_distance, pair_products, spread
from stillhouse.method import Card, Claim, MethodConfig, StudentTraining, Variant
from stillhouse.models.causal_lm import LanguageNet
from stillhouse.net import Net
from stillhouse.objective import Count, Objective
from stillhouse.parts.across import whole_batch
from stillhouse.parts.adaptive_replay import AdaptiveThreshold, choose_branch
from stillhouse.parts.band import Band
from stillhouse.parts.own_text import Replay, Revised, revised, written
from stillhouse.parts.phrases import Chunker, located, phrases, token_intervals
from stillhouse.parts.text_alignment import read, spoken
from stillhouse.parts.text_correction import Reworded, TextTeacher, meeting, reworded
from stillhouse.parts.token_rows import next_tokens, predicting
from stillhouse.recipe import GIVEN
from stillhouse.stages.supervised import Supervised
from stillhouse.tasks.text_generation import asked_once
from stillhouse.teacher import Frozen, Knowledge, TopK, Want
from stillhouse.teachers.live import Live

ROWS = ("tokens", "attention_mask", "response_mask")
_PERIODS = 10  # parts of the training that the report tells apart
_REMEMBERED = 50_000  # texts whose phrases are kept
EXPERIMENTAL = (
    "Experimental: teacher and student have different vocabularies and meet on the text alone."
)


class Teaching(NamedTuple):
    """What a teacher says of response tokens, one below another.

    Attributes:
        rows: tensors with one row per token.
        distribution: rows (a chunk of them) to logits (n, V), or to the classes a store kept.
    """

    rows: tuple[Tensor, ...]
    distribution: Callable[..., Any]


class DACKLObjective(Objective):
    """The three revisions; holds the sub-network, the buffer of own texts and the threshold.

    Args:
        student: a causal language model.
        task: text generation.
        config: see `DACKL.Config`.
        teacher: of the run; None when nothing is matched.
        band: chooses quantiles; None unless the token loss is "dac".
        chunker: a text to its spans.

    Attributes:
        texts: (periods, 5) sums over the steps of each tenth: steps, steps on fresh text, on
            replayed text, rows written, rows corrected.
        bands: (periods, 4) tokens, sums of kept mass and of kept classes, and of the divergence.
    """

    student: LanguageNet
    band: Band | None
    texts: Tensor
    bands: Tensor

    def __init__(
        self,
        student: Net,
        task: Any,
        config: DACKL.Config,
        *,
        teacher: Any = None,
        band: Band | None = None,
        chunker: Chunker = phrases,
    ) -> None:
        if not isinstance(student, LanguageNet):
            raise ModelError(
                f"dackl distils causal language models; {type(student.module).__name__} is none "
                "(task: text-generation)"
            )
        super().__init__(student)
        self.task, self.config, self.chunker = task, config, chunker
        self.band = band
        self.distils = config.w_dac > 0 or config.w_span > 0
        self.writes = self.distils and config.text != "given"
        # From hidden states, where there is no store of what the teacher says.
        self.pieces = config.chunk > 0 and isinstance(teacher, Live)
        self.by_text = config.alignment == "text" and self.distils
        # The objective itself asks the teacher about the rows that it reads.
        self.asks = self.pieces or self.by_text
        # It is no module of the objective: neither trained nor saved with it.
        self._teacher: Any = teacher if self.writes or (self.distils and self.asks) else None
        if self._teacher is not None and "fresh" not in self._teacher.provides:
            self._teacher.guest()  # says why it cannot
        self.wants = tuple(
            want
            for want, needed in (
                (Want("logits"), self.distils and not self.asks),
                (Want("fresh"), self.writes or (self.distils and self.asks)),
            )
            if needed
        )
        longest = int(task.about["input"]["length"])
        self.sampler = task.sampler(config.max_new, top_p=config.top_p, top_k=config.top_k,
                                    temperature=config.temperature)  # fmt: skip
        self.phi = AdaptiveThreshold(config.init_threshold, margin=config.threshold_margin)
        self.replay = (
            Replay(config.capacity, longest, task.tokens.padding, named=self.by_text)
            if self.writes
            else None
        )
        self.reader = TextTeacher(self._teacher.guest().module) if self.by_text else None
        self.longest = longest
        self.register_buffer("texts", torch.zeros(_PERIODS, 5, dtype=torch.float64))
        self.register_buffer("bands", torch.zeros(_PERIODS, 4, dtype=torch.float64))
        self._spans: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        self._words: dict[int, str] = {}
        self._prompts: dict[int, str] = {}

    # ---- stage 1: which text, and stage 2: the sequence put right --------------------------

    def prepare(self, batch: Batch, clock: Clock) -> Batch:
        """Choose the step's text: given, replayed, or written and corrected now."""
        if not self.distils:
            return batch
        branch = self._branch(clock)
        rows: Batch | None = None
        corrected = 0.0
        if branch == "sample":
            rows, corrected = self._write(batch, clock)
        elif branch == "replay":
            assert self.replay is not None
            whole = self.replay.drawn(batch.of, clock.rng("replay"))
            rows = whole.select(batch.rows)
        chosen = batch if rows is None else self._instead(batch, rows)
        if self.config.w_span > 0:
            chosen = Batch(chosen, pairs=self.pairs(chosen))
        if self.by_text:
            chosen = self._aligned(chosen)
        own = float(batch.size if branch == "sample" else 0)
        counts = [1.0, branch == "sample", branch == "replay", own, corrected]
        self.propose(texts=self._period(clock, self.texts, counts))
        if self.writes:
            self.note("threshold", self.phi.phi.float())
        return chosen

    def _branch(self, clock: Clock) -> str:
        if not self.writes:
            return "truth"
        if self.config.text == "own":
            return "sample"
        assert self.replay is not None
        chance = float(torch.rand((), generator=clock.rng("branch"), dtype=torch.float64))
        return choose_branch(
            chance, float(self.phi.phi), clock.step, clock.total, full=self.replay.full
        )

    def _write(self, batch: Batch, clock: Clock) -> tuple[Batch, float]:
        """Text of the student, corrected; the buffer takes the rows of the global batch."""
        assert self.replay is not None
        size = self.sampler.max_new
        rows = written(
            self.student, batch, self.sampler, clock.rand("sample", batch, size),
            longest=self.longest,
        )  # fmt: skip
        corrected = 0.0
        for number in range(self.config.scrg_rounds):
            chance = clock.rand(f"again {number}", batch, size)
            found = self.revise(rows, batch.get("prompt", []), chance)
            rows = found.rows
            corrected += float(found.corrected.sum()) / self.config.scrg_rounds
        if self.by_text:
            rows = Batch(rows, id=batch["id"])
        kept = self.replay.kept(rows)
        self.replay.propose(**{k: whole_batch(v, batch.of, clock) for k, v in kept.items()})
        return rows, corrected

    def revise(self, rows: Batch, prompts: list[str], chance: Tensor) -> Revised | Reworded:
        """One round of correction, at a token or, on text, at a word.

        Args:
            rows: what the student wrote.
            prompts: of the rows as text; read on text only.
            chance: (B, max_new) uniform numbers of what it goes on with.
        """
        if self.reader is None:
            return revised(
                self.student, rows, self.disagreement, self.sampler, chance, longest=self.longest
            )
        return reworded(
            self.student, self.task.tokens, rows, prompts, self.reader, self.likelihood,
            self.sampler, chance, longest=self.longest,
        )  # fmt: skip

    def _instead(self, batch: Batch, rows: Batch) -> Batch:
        """The batch with other text to match on; the given one stays for its own loss."""
        truth = Batch({name: batch[name] for name in ("id", *ROWS)})
        chosen = Batch(batch, **{name: rows[name] for name in ROWS}, truth=truth)
        if not self.by_text:
            return chosen
        # A replayed text answers another prompt than the given one of its row.
        return Batch(chosen, prompt=self._asked(rows["id"]), response=[""] * batch.size)

    def _asked(self, ids: Tensor) -> list[str]:
        """Prompts by the ids of their rows; those of the data are read when first needed."""
        if not self._prompts:
            source = self.task.splits["train"]
            for rows in torch.split(torch.arange(len(source)), 1024):
                read_in = read_rows(source, rows, None, self.task.collate)
                self._prompts.update(zip(read_in["id"].tolist(), read_in["prompt"], strict=True))
        return [self._prompts[number] for number in ids.tolist()]

    def _aligned(self, rows: Batch) -> Batch:
        """The rows with the teacher's own of the same texts, and where the two meet.

        `theirs` are the teacher's rows; `aligned` (B, L) is the column of them that speaks of the
        same continuation as a column of the student's, -1 for none.
        """
        assert self.reader is not None
        tokens = self.task.tokens
        ours = [
            spoken(tokens, ids[mask].tolist(), text)
            for ids, mask, text in zip(
                rows["tokens"].cpu(), rows["response_mask"].cpu(), rows["response"], strict=True
            )
        ]
        theirs = [read(self.reader.tokens, found.text, ended=found.ended) for found in ours]
        read_by = self.reader.rows(rows["prompt"], theirs, rows["tokens"].device)
        places = meeting(rows, ours, read_by, theirs)
        return Batch(rows, theirs=Batch(read_by, id=rows["id"]), aligned=places)

    def likelihood(self, rows: Mapping[str, Any]) -> Tensor:
        """(B, L) log-likelihood by the student of the token that each place speaks of."""
        at, following = predicting(rows["response_mask"]), next_tokens(rows["tokens"])
        with torch.no_grad(), _judging(self.student):
            logits = wide(self.student(rows["tokens"])["logits"][at])
        found = logits.new_zeros(at.shape)
        found[at] = -F.cross_entropy(logits, following[at], reduction="none")
        return found

    def disagreement(self, rows: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """KL(p || q) at each place (B, L), and the teacher's likeliest token there (B, L)."""
        at = predicting(rows["response_mask"])
        teacher: Any = self._teacher.guest().module
        with torch.no_grad(), _judging(self.student):
            if self.pieces:
                ours, theirs = (net.hidden(rows["tokens"])[at] for net in (self.student, teacher))
                heads = self._head(self.student), self._head(teacher)
                parts = [
                    _apart(heads[0](a), heads[1](b))
                    for a, b in zip(*(torch.split(x, self.config.chunk) for x in (ours, theirs)))
                ]
                apart, likeliest = (torch.cat(x) for x in zip(*parts))
            else:
                nets = (self.student, teacher)
                apart, likeliest = _apart(*(net(rows["tokens"])["logits"][at] for net in nets))
        found = apart.new_zeros(at.shape), torch.zeros_like(rows["tokens"])
        found[0][at], found[1][at] = apart, likeliest
        return found

    def pairs(self, rows: Mapping[str, Any]) -> Tensor:
        """(B, L) int64: how many spans hold both the token that position k speaks of and the next.

        The response is decoded and cut into spans; spans become intervals of its tokens.
        """
        tokens, said = rows["tokens"].cpu(), rows["response_mask"].cpu()
        found = torch.zeros_like(tokens)
        for row, (ids, mask) in enumerate(zip(tokens, said, strict=True)):
            places = mask.nonzero()[:, 0]
            if not len(places):
                continue
            start = int(places[0]) - 1
            for first, last in self._intervals(tuple(ids[mask].tolist())):
                found[row, start + first : start + last] += 1
        return found.to(rows["tokens"].device)

    def _intervals(self, ids: tuple[int, ...]) -> list[tuple[int, int]]:
        known = self._spans.get(ids)
        if known is None:
            tokens = self.task.tokens
            text = tokens.text(list(ids))
            offsets = located([self._word(number) for number in ids], text)
            known = token_intervals(self.chunker(text), offsets)
            if len(self._spans) < _REMEMBERED:
                self._spans[ids] = known
        return known

    def _word(self, number: int) -> str:
        if number not in self._words:
            self._words[number] = str(self.task.tokens.tokenizer.decode([number]))
        return self._words[number]

    # ---- stages 3 to 5: the terms ----------------------------------------------------------

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms `sft`, `dac` and `span`, as far as they have a weight."""
        config = self.config
        truth = batch.get("truth")
        terms: dict[str, Tensor] = {}
        states = self._states(batch) if self.distils or truth is None else None
        if config.w_sft > 0:
            given = states if truth is None else self._states(truth)
            assert given is not None
            terms["sft"] = config.w_sft * self._cross_entropy(
                given, batch if truth is None else truth
            )
        if not self.distils:
            return terms
        assert states is not None
        if self.by_text:
            terms["dac"] = config.w_dac * self._sorted(states, batch, clock)
            return terms
        at = predicting(batch["response_mask"])
        teaching = self._teaching(batch, knowledge, at)
        ours, targets = states[at], next_tokens(batch["tokens"])[at]
        if config.w_dac > 0:
            terms["dac"] = config.w_dac * self._tokens(ours, targets, teaching, clock)
        if config.w_span > 0:
            first = (at.flatten().cumsum(0) - 1)[batch["pairs"].flatten().nonzero()[:, 0]]
            times = batch["pairs"][batch["pairs"] > 0]
            terms["span"] = config.w_span * self._pairs(
                ours, teaching, first.repeat_interleave(times)
            )
        return terms

    def count(self, batch: Batch) -> Count:
        """Response tokens of the given text, of the matched text, and pairs within spans.

        On text the places that are matched are counted in place of the tokens.
        """
        own = batch.get("truth", batch)
        counts: dict[str, Tensor | int] = {"sft": own["response_mask"].sum()}
        if self.distils:
            matched = batch["aligned"] >= 0 if self.by_text else batch["response_mask"]
            counts["dac"] = matched.sum()
            counts["span"] = batch["pairs"].sum() if "pairs" in batch else 0
        return counts

    def _states(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, L, V) logits; or (B, L, D) hidden states where logits are made in pieces."""
        if self.config.chunk:
            return self.student.hidden(batch["tokens"])
        logits: Tensor = self.student(batch["tokens"])["logits"]
        return logits

    def _head(self, net: Any) -> Callable[[Tensor], Tensor]:
        """From hidden states to logits of the ids that both models have."""
        head, size = net.head_layer(), net.vocabulary
        if size is None or size >= head.out_features:
            return head  # type: ignore[no-any-return]
        return lambda hidden: head(hidden)[..., :size]

    def _over(
        self, items: Callable[..., Tensor], states: Tensor, *rows: Tensor, learnt: Any = ()
    ) -> Tensor:
        """The mean of `items(logits, *rows)` over tokens, from logits or piece by piece."""
        if not self.config.chunk:
            return items(states, *rows).mean()
        head = self._head(self.student)
        own = [] if isinstance(head, nn.Module) else [*self.student.head_layer().parameters()]
        return chunked(
            items, states, head, *rows, chunk_size=self.config.chunk, parameters=[*own, *learnt]
        )

    def _cross_entropy(self, states: Tensor, rows: Mapping[str, Any]) -> Tensor:
        at = predicting(rows["response_mask"])
        targets = next_tokens(rows["tokens"])[at]
        return self._over(
            lambda logits, y: F.cross_entropy(wide(logits), y, reduction="none"),
            states[at],
            targets,
        )

    def _teaching(self, batch: Batch, knowledge: Knowledge, at: Tensor) -> Teaching:
        """What the teacher says at the places `at`: logits, a store's classes, or hidden states."""
        if self.pieces:
            teacher: Any = self._teacher.guest().module
            with torch.no_grad():
                hidden = teacher.hidden(batch["tokens"])[at]
            head = self._head(teacher)
            return Teaching((hidden,), lambda h: head(h).detach())
        said = knowledge["logits"]
        if isinstance(said, TopK):
            temperature = said.temperature
            rows = (said.ids[at], said.logp[at], said.rest[at])
            return Teaching(rows, lambda ids, logp, rest: TopK(ids, logp, rest, temperature))
        logits = knowledge.tensor("logits")[at]
        return Teaching((logits[..., : self.student.vocabulary],), lambda logits: logits)

    def _tokens(self, states: Tensor, targets: Tensor, teaching: Teaching, clock: Clock) -> Tensor:
        """The token loss, with the penalty that keeps the band from shrinking."""
        seen: list[Tensor] = []

        def items(logits: Tensor, y: Tensor, *rows: Tensor) -> Tensor:
            return self.token_loss(logits, teaching.distribution(*rows), y, seen)

        learnt = [] if self.band is None else list(self.band.parameters())
        found = self._over(items, states, targets, *teaching.rows, learnt=learnt)
        if seen:
            self._tell(torch.stack(seen).sum(0), clock)
        return found

    def _tell(self, sums: Tensor, clock: Clock) -> None:
        """Note tokens, kept mass, kept classes and divergence, (4,) sums over a batch."""
        tokens = sums[0].clamp_min(1.0)
        self.note("kept_mass", sums[1] / tokens)
        self.note("set_size", sums[2] / tokens)
        self.propose(bands=self._period(clock, self.bands, sums))

    def _sorted(self, states: Tensor, batch: Batch, clock: Clock) -> Tensor:
        """The token loss on text: largest probabilities, in order, where both sides meet."""
        assert self.reader is not None
        at, k = batch["aligned"] >= 0, self.config.k
        said = self.reader.logits(batch["theirs"])[at.nonzero()[:, 0], batch["aligned"][at]]
        found = sorted_distance(states[at], said, k=k, reduction="none")
        classes = min(k, said.shape[-1])
        mass = wide(said).softmax(-1).topk(classes, -1).values.sum()
        told = (len(found), mass, len(found) * classes, found.detach().sum())
        sums = torch.stack([torch.as_tensor(x).double().to(found.device) for x in told])
        self._tell(sums, clock)
        self.note("aligned", at.sum() / batch["response_mask"].sum().clamp_min(1))
        return found.sum() / max(1, len(found))

    def token_loss(
        self, logits: Tensor, teacher: Any, target: Tensor, seen: list[Tensor] | None = None
    ) -> Tensor:
        """(n,) the token loss at logits (n, V); see `DACKL.Config.divergence`.

        Args:
            logits: of the student.
            teacher: (n, V) logits, or kept classes.
            target: (n,) int64.
            seen: gets tokens, kept mass, kept classes and divergence, summed.
        """
        config = self.config
        if config.divergence in ("dac", "top-k"):
            lower, upper = self.quantiles(logits, teacher)
            found = clipped_kl(
                logits, teacher, target, lower, upper, scale=config.quantile_scale,
                renorm=config.renorm, gate_scale=config.gate_scale,
            )  # fmt: skip
            if seen is not None:
                told = (found.mass, found.size, found.loss)
                sums = [float(len(logits)), *(x.detach().double().sum() for x in told)]
                seen.append(
                    torch.stack([torch.as_tensor(x).double().to(logits.device) for x in sums])
                )
            if config.divergence == "top-k" or config.mass_weight == 0:
                return found.loss
            return found.loss + config.mass_weight * mass_penalty(found.mass, config.least_mass)
        if isinstance(teacher, TopK):
            return topk_kl(logits, teacher, reduction="none")
        if config.divergence == "total-variation":
            return total_variation(logits, teacher, reduction="none")
        return kl(
            logits, teacher, direction=_DIRECTIONS[config.divergence], beta=config.beta,
            skew=config.skew, reduction="none",
        )  # fmt: skip

    def quantiles(self, logits: Tensor, teacher: Any) -> tuple[Tensor, Tensor]:
        """The band of each token, (n,) and (n,): of the sub-network, or that of the k likeliest."""
        config = self.config
        if self.band is None:
            # just below the rank, which then rounds up to it
            rank = max(1.0, min(config.top_k_classes, logits.shape[-1]) - 0.5)
            low = 1.0 - math.log(rank) / math.log(logits.shape[-1])
            lower = torch.full(
                logits.shape[:-1], low, device=logits.device, dtype=wide(logits).dtype
            )
            return lower, torch.ones_like(lower)
        if config.features == "top-k":
            features = band_features(logits, teacher, self._features(logits.shape[-1], teacher))
        else:
            if isinstance(teacher, TopK):
                teacher = spread(teacher.logp, teacher.ids, teacher.rest, logits.shape[-1])
            features = torch.cat([wide(x.detach()).softmax(-1) for x in (teacher, logits)], -1)
        return self.band(features)  # type: ignore[no-any-return]

    def _features(self, classes: int, teacher: Any) -> int:
        assert self.band is not None
        wanted = (self.band.inner.in_features - 2) // 2
        kept = teacher.ids.shape[-1] if isinstance(teacher, TopK) else classes
        if kept < wanted:
            raise ModelError(
                f"the sub-network reads the {wanted} likeliest classes, the teacher's store keeps "
                f"{kept}: set k to {kept}, or capture more (teacher: store: {{k: {wanted}}})"
            )
        return int(wanted)

    def _pairs(self, states: Tensor, teaching: Teaching, first: Tensor) -> Tensor:
        """The span loss over pairs of neighbours, rows `first` and `first + 1`."""
        distance = self.config.distance
        if not self.config.chunk:
            return pair_products(
                states, teaching.distribution(*teaching.rows), first, distance=distance
            )
        head, count = self._head(self.student), len(teaching.rows)

        def items(logits: Tensor, second: Tensor, *rows: Tensor) -> Tensor:
            classes = logits.shape[-1]
            said = [
                _dense(teaching.distribution(*part), classes)
                for part in (rows[:count], rows[count:])
            ]
            return pair_distance((logits, head(second)), (said[0], said[1]), distance)

        learnt = list(self.student.head_layer().parameters())
        after = first + 1
        rows = [x[first] for x in teaching.rows] + [x[after] for x in teaching.rows]
        return chunked(
            items, states[first], lambda hidden: head(hidden), states[after], *rows,
            chunk_size=self.config.chunk, parameters=learnt,
        )  # fmt: skip

    # ---- state -----------------------------------------------------------------------------

    def _period(self, clock: Clock, like: Tensor, values: Any) -> Tensor:
        added = torch.zeros_like(like)
        period = min(_PERIODS - 1, clock.step * _PERIODS // max(1, clock.total))
        added[period] = torch.as_tensor(values, dtype=like.dtype, device=like.device)
        return added

    def commit(self, made: dict[str, list[Tensor]]) -> None:
        """Sums of the report take what the micro-batches add to them."""
        for name, values in made.items():
            getattr(self, name).add_(torch.stack(values).sum(0))

    def after_validation(self, scores: Mapping[str, float], clock: Clock) -> None:
        """The threshold hears the validation loss."""
        if "loss" in scores:
            self.phi.observe(scores["loss"])

    def guests(self) -> Iterator[Frozen]:
        """The teacher, where it is asked about text that was just written."""
        return iter(()) if self._teacher is None else iter((self._teacher.guest(),))


_DIRECTIONS: dict[str, Any] = {
    "forward": "forward",
    "reverse": "reverse",
    "symmetric": "symmetric",
    "jsd": "js",
    "skewed-forward": "skewed_forward",
    "skewed-reverse": "skewed_reverse",
}


def _apart(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return kl(student, teacher, reduction="none", scale=False), teacher.argmax(-1)


def _dense(teacher: Any, classes: int) -> Tensor:
    if isinstance(teacher, TopK):
        return spread(teacher.logp, teacher.ids, teacher.rest, classes)
    assert isinstance(teacher, Tensor)
    return teacher


@contextmanager
def _judging(net: nn.Module) -> Iterator[None]:
    """Eval mode, and back, module by module."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class DACKL(StudentTraining):
    """Distillation of language models whose signal is revised by sequence, token and span."""

    card = Card(
        id="dackl",
        title="Multi-Granularity Semantic Revision for Large Language Model Distillation",
        summary="Own text is corrected at one token, the teacher's distribution clipped to a "
        "learnt band, and phrases are matched as units.",
        paper="ACL 2026; arXiv 2407.10068",
        year=2024,
        authors=("Xiaoyu Liu", "Yun Zhang", "Wei Li", "Simiao Li", "Xudong Huang", "Hanting Chen",
                 "Yehui Tang", "Jie Hu", "Zhiwei Xiong", "Yunhe Wang"),
        links=("https://arxiv.org/abs/2407.10068", "https://github.com/jongwooko/distillm"),
        room="language",
        task="text-generation",
        needs=("logits", "fresh"),
        yields="model",
        stages=(
            ("teacher?", "train"),
            ("capture?", "capture"),
            ("sft?", "train"),
            ("answers?", "label"),
            ("student", "train"),
            ("corrections?", "closed"),
        ),
        reconstructed=True,
    )  # fmt: skip

    class Config(MethodConfig):
        """Settings of `dackl`."""

        shared: ClassVar[frozenset[str]] = frozenset({"sft_epochs"})

        w_sft: float = Field(
            1.0,
            ge=0,
            description="weight of the cross-entropy on given responses",
            json_schema_extra={"source": "paper: the sum of three, unweighted"},
        )
        w_dac: float = Field(
            1.0,
            ge=0,
            description="weight of the token loss",
            json_schema_extra={"source": "paper: the sum of three, unweighted"},
        )
        w_span: float = Field(
            1.0,
            ge=0,
            description="weight of the span loss",
            json_schema_extra={"source": "paper: the sum of three, unweighted"},
        )
        sft_epochs: float = Field(
            1.0,
            ge=0,
            description="epochs on given responses by which the student starts; 0 for none",
            json_schema_extra={"source": "DistiLLM: 3 (scripts/gpt2/init)"},
        )
        text: Literal["adaptive", "own", "given"] = Field(
            "adaptive",
            description="what tokens and spans are matched on: adaptive follows the threshold, own "
            "is written anew at every step, given are the data's responses",
            json_schema_extra={"source": "DistiLLM: adaptive"},
        )
        init_threshold: float = Field(
            0.0,
            ge=0,
            le=1,
            description="share of steps on own text at first; a short run should begin at 0.5, "
            "since the threshold rises only when the validation loss does",
            json_schema_extra={"source": "DistiLLM: 0.0 (arguments.py)"},
        )
        threshold_margin: float = Field(
            0.1,
            ge=0,
            description="by how much the validation loss must rise to raise the threshold by 0.1",
            json_schema_extra={"source": "DistiLLM: loss-eps 0.1"},
        )
        evaluations: int = Field(
            10,
            ge=1,
            description="validations during the training, by which the threshold rises",
            json_schema_extra={"source": "ours; DistiLLM: one an epoch, 20 epochs"},
        )
        capacity: int = Field(
            1000,
            ge=1,
            description="own texts that are kept to be replayed, in sequences",
            json_schema_extra={"source": "DistiLLM: 1000"},
        )
        scrg_rounds: int = Field(
            1,
            ge=0,
            description="how often a text just written is corrected and gone on with",
            json_schema_extra={"source": "paper: 1; 0, 1, 3 and 5 are tested"},
        )
        max_new: int = Field(
            0,
            ge=0,
            description="most tokens of a written response; 0 for the longest of the data",
            json_schema_extra={"source": "DistiLLM: 512 with the prompt"},
        )
        temperature: float = Field(
            1.0,
            gt=0,
            description="of sampling",
            json_schema_extra={"source": "DistiLLM scripts: 1"},
        )
        top_p: float = Field(
            1.0,
            gt=0,
            le=1,
            description="of sampling: the nucleus",
            json_schema_extra={"source": "DistiLLM scripts: 1"},
        )
        top_k: int = Field(
            0,
            ge=0,
            description="of sampling: this many most likely tokens, 0 for all",
            json_schema_extra={"source": "DistiLLM scripts: 0"},
        )
        divergence: Literal[
            "dac", "top-k", "forward", "reverse", "symmetric", "jsd", "total-variation",
            "skewed-forward", "skewed-reverse", "sorted",
        ] = Field(
            "dac",
            description="token loss: dac, a fixed band of the top_k_classes likeliest, or a "
            "divergence over all classes; sorted, of alignment text alone (experimental): the k "
            "largest probabilities in falling order, whatever classes they belong to",
            json_schema_extra={"source": "paper: dac; the others are its Table 3c; sorted: ours"},
        )  # fmt: skip
        top_k_classes: int = Field(
            10,
            ge=1,
            description="classes of the fixed band",
            json_schema_extra={"source": "ours"},
        )
        beta: float = Field(
            0.5,
            ge=0,
            le=1,
            description="the teacher's share in symmetric and jsd",
            json_schema_extra={"source": "GKD: 0.5; DistiLLM's symmetric: 0.1"},
        )
        skew: float = Field(
            0.1,
            ge=0,
            lt=1,
            description="the own distribution's share in the skewed divergences",
            json_schema_extra={"source": "DistiLLM: 0.1"},
        )
        quantile_scale: Literal["logrank", "linear"] = Field(
            "logrank",
            description="quantiles by the logarithm of the rank, or of the values",
            json_schema_extra={"source": "ours; a quantile of 32,000 values misses their head"},
        )
        renorm: Literal["both", "none"] = Field(
            "both",
            description="both sides are renormalised on the kept classes, or summed as they are",
            json_schema_extra={"source": "reconstructed"},
        )
        gate_scale: float = Field(
            1.0,
            gt=0,
            description="width of the gates through which the sub-network learns",
            json_schema_extra={"source": "reconstructed"},
        )
        features: Literal["top-k", "full"] = Field(
            "top-k",
            description="what the sub-network reads: the k likeliest classes and entropies, or "
            "both whole distributions",
            json_schema_extra={"source": "reconstructed"},
        )
        k: int = Field(
            64,
            ge=1,
            description="classes that the sub-network reads; of sorted: largest probabilities that "
            "are compared",
            json_schema_extra={"source": "reconstructed"},
        )
        hidden: int = Field(
            128,
            ge=1,
            description="width of the sub-network",
            json_schema_extra={"source": "reconstructed"},
        )
        band_lr: float = Field(
            1e-4,
            gt=0,
            description="learning rate of the sub-network",
            json_schema_extra={"source": "reconstructed"},
        )
        least_mass: float = Field(
            0.9,
            ge=0,
            le=1,
            description="probability that a band should keep",
            json_schema_extra={"source": "ours: against a band of one class"},
        )
        mass_weight: float = Field(
            1.0,
            ge=0,
            description="weight of what it lacks",
            json_schema_extra={"source": "ours"},
        )
        distance: Literal["l2", "kl_norm", "cos"] = Field(
            "l2",
            description="between products of neighbouring distributions",
            json_schema_extra={"source": "reconstructed"},
        )
        responses: Literal["data", "teacher"] = Field(
            "data",
            description="given responses are the data's, or written by the teacher once (SeqKD)",
            json_schema_extra={"source": "paper: data; SeqKD (Kim and Rush 2016): teacher"},
        )
        chunk: int = Field(
            0,
            ge=0,
            description="tokens whose logits are made at a time, for large vocabularies; 0 for all "
            "at once",
            json_schema_extra={"source": "ours: memory only, the gradient is the same"},
        )

        alignment: Literal["tokens", "text"] = Field(
            "tokens",
            description="tokens: teacher and student share a vocabulary; text (experimental): the "
            "teacher reads the text by its own tokenizer, a word is corrected in place of a "
            "token, and there is no span loss (variant text-level)",
            json_schema_extra={"source": "paper: tokens; text: ours"},
        )
        teacher_template: str | None = Field(
            None,
            description="of alignment text: form of the teacher's prompts, with {prompt} where the "
            "text goes, or chat; none: as it was trained, or the prompt and a new line",
            json_schema_extra={"source": "ours"},
        )

        @model_validator(mode="after")
        def _one_vocabulary_or_text(self) -> DACKL.Config:
            if self.alignment == "tokens":
                if self.divergence == "sorted":
                    raise ValueError(
                        "divergence: sorted compares models of different vocabularies: set "
                        "alignment: text too (variant: text-level sets both), or leave it out"
                    )
                if self.teacher_template is not None:
                    raise ValueError("teacher_template is read under alignment: text only")
                return self
            if self.w_span > 0:
                raise ValueError(
                    "the span loss multiplies the probabilities of the same ids of neighbouring "
                    "tokens, which two vocabularies do not have: with alignment: text set w_span: "
                    "0 (variant: text-level does)"
                )
            if self.w_dac > 0 and self.divergence != "sorted":
                raise ValueError(
                    f"divergence: {self.divergence} compares the same ids, which two vocabularies "
                    "do not have: with alignment: text set divergence: sorted (variant: text-level "
                    "does)"
                )
            if self.chunk > 0:
                raise ValueError("alignment: text makes all logits at once: set chunk: 0")
            unread = {"features": "top-k", "quantile_scale": "logrank", "renorm": "both"}
            for name, default in unread.items():
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}: {getattr(self, name)} is of the learnt band, which alignment: "
                        f"text has none of: leave out {name}"
                    )
            return self

        @model_validator(mode="after")
        def _something_to_learn(self) -> DACKL.Config:
            if self.w_sft == 0 and self.w_dac == 0 and self.w_span == 0:
                raise ValueError("w_sft, w_dac and w_span are all 0, so nothing would be learnt")
            return self

    variants: ClassVar[dict[str, Variant]] = {
        "sft": Variant(
            set={"scrg_rounds": 0, "w_span": 0.0, "w_dac": 0.0, "text": "given"},
            about="given responses only, no teacher",
        ),
        "kd": Variant(
            set={"scrg_rounds": 0, "w_span": 0.0, "divergence": "forward", "text": "given"},
            about="word-level distillation: forward KL on given responses",
        ),
        "seq-kd": Variant(
            set={
                "scrg_rounds": 0,
                "w_span": 0.0,
                "w_dac": 0.0,
                "text": "given",
                "responses": "teacher",
            },
            about="the student learns the teacher's own responses",
        ),
        "kd-scrg": Variant(
            set={"divergence": "forward", "w_span": 0.0},
            about="forward KL, own text corrected: the first step of the paper's ablation",
        ),
        "dac": Variant(
            set={"scrg_rounds": 0, "w_span": 0.0, "text": "given"},
            about="DAC-KL alone, on given responses",
        ),
        "minus-scrg": Variant(set={"scrg_rounds": 0}, about="own text is not corrected"),
        "minus-dac": Variant(set={"divergence": "forward"}, about="forward KL over all classes"),
        "minus-span": Variant(set={"w_span": 0.0}, about="no span loss"),
        "on-policy": Variant(set={"text": "own"}, about="own text at every step"),
        "given-text": Variant(set={"text": "given"}, about="no own text"),
        "scrg-3": Variant(set={"scrg_rounds": 3}, about="three corrections"),
        "scrg-5": Variant(set={"scrg_rounds": 5}, about="five corrections"),
        "fixed-top-k": Variant(
            set={"divergence": "top-k"}, about="a fixed band in place of the learnt one"
        ),
        "linear": Variant(set={"quantile_scale": "linear"}, about="quantiles of the values"),
        "full-features": Variant(
            set={"features": "full"}, about="the sub-network reads both whole distributions"
        ),
        "no-renorm": Variant(set={"renorm": "none"}, about="sums as they are on the kept classes"),
        "no-mass": Variant(set={"mass_weight": 0.0}, about="nothing stands against collapse"),
        "span-kl": Variant(set={"distance": "kl_norm"}, about="KL of renormalised products"),
        "span-cos": Variant(set={"distance": "cos"}, about="cosine of products"),
        "reverse": Variant(
            set={"scrg_rounds": 0, "w_span": 0.0, "divergence": "reverse"},
            about="reverse KL, uncorrected own text",
        ),
        "gkd": Variant(
            set={"scrg_rounds": 0, "w_span": 0.0, "divergence": "jsd", "text": "own"},
            about="GKD: JSD on own text at every step",
        ),
        "symmetric": Variant(
            set={"scrg_rounds": 0, "w_span": 0.0, "divergence": "symmetric", "beta": 0.1},
            about="symmetric KL as DistiLLM's baseline weighs it",
        ),
        "total-variation": Variant(
            set={"scrg_rounds": 0, "w_span": 0.0, "divergence": "total-variation"},
            about="total variation",
        ),
        "distillm-forward": Variant(
            set={"scrg_rounds": 0, "w_span": 0.0, "divergence": "skewed-forward"},
            about="DistiLLM: skewed forward KL",
        ),
        "distillm-reverse": Variant(
            set={"scrg_rounds": 0, "w_span": 0.0, "divergence": "skewed-reverse"},
            about="DistiLLM: skewed reverse KL",
        ),
        "text-level": Variant(
            set={"alignment": "text", "divergence": "sorted", "w_span": 0.0},
            about="experimental, for another vocabulary: own text corrected at a word, the "
            "largest probabilities matched in order where both tokenizers have a boundary",
        ),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("beats word-level distillation at equal steps", "sampled_rouge_l", "dackl",
              "dackl/kd"),
        Claim("beats the student alone at equal steps", "sampled_rouge_l", "dackl", "dackl/sft"),
        Claim("beats the student alone at equal steps, most likely token each time", "rouge_l",
              "dackl", "dackl/sft"),
        Claim("correcting own text adds to word-level distillation", "sampled_rouge_l",
              "dackl/kd-scrg", "dackl/kd"),
        Claim("the learnt band adds to it", "sampled_rouge_l", "dackl/minus-span",
              "dackl/kd-scrg"),
        Claim("the span loss adds to it", "sampled_rouge_l", "dackl", "dackl/minus-span"),
        Claim("DAC-KL beats the forward KL on the same text", "sampled_rouge_l", "dackl/dac",
              "dackl/kd"),
        Claim("corrected text makes the student repeat itself less than uncorrected text",
              "sampled_repetition", "dackl", "dackl/minus-scrg", "lower"),
        Claim("corrected text beats uncorrected text", "sampled_rouge_l", "dackl",
              "dackl/minus-scrg"),
    ]  # fmt: skip

    def wants_teacher(self) -> bool:
        """Not where nothing is matched and nothing is asked of it."""
        config = self.config
        return bool(config.w_dac > 0 or config.w_span > 0 or config.responses == "teacher")

    def objective(self, job: Any, student: Net, teacher: Any) -> Objective:
        """The three terms, with a sub-network where the band is learnt."""
        config, band = self.config, None
        if config.divergence == "dac" and config.w_dac > 0:
            classes = getattr(student, "vocabulary", None) or job.task.vocabulary.size
            width = 2 * classes if config.features == "full" else 2 * min(config.k, classes) + 2
            band = job.build(lambda: Band(width, config.hidden), "band")
        return DACKLObjective(student, job.task, config, teacher=teacher, band=band)

    def training(self, job: Any) -> dict[str, Any]:
        """The sub-network has its own rate; validations move the threshold."""
        config, given = self.config, dict[str, Any]()
        if config.divergence == "dac" and config.w_dac > 0:
            given["optim"] = {
                "student.*": optimizer_of(job.budget),
                "band.*": lambda params: AdamW(params, lr=config.band_lr),
            }
        return given

    def check_teacher(self, job: Any, net: Net) -> None:
        """The same vocabulary; or, on text, a tokenizer of its own."""
        if self.config.alignment == "text":
            if not getattr(net, "apart", False):
                job.task.check_apart(net, self.config.teacher_template)
            return
        try:
            super().check_teacher(job, net)
        except VocabularyError as error:
            raise VocabularyError(
                f"{error}; or match them on text, which is experimental: variant: text-level "
                "(alignment: text)"
            ) from error

    def _teacher(self, job: Any) -> Any:
        """The teacher, where one is asked; on text a network that can be asked afresh."""
        if not self.wants_teacher():
            return None
        by_text, spec = self.config.alignment == "text", job.recipe.teacher
        if by_text and spec is not None and spec.store is not None:
            raise job.recipe.refusal(
                "teacher",
                "a store keeps what a teacher says at the data's tokens; with alignment: text it "
                "reads the text by its own: leave out store, and give the teacher as a model",
            )
        teacher = job.teacher()
        if by_text:
            self.check_teacher(job, teacher.guest().module)
        return teacher

    def run(self, job: Any) -> Artifact:
        """The teacher, the student's start, own and given text, the student."""
        config = self.config
        teacher = self._teacher(job)
        student = job.student()
        job.task.check(student, None)
        self._start(job, student)
        order = self.order(job)
        if config.responses == "teacher":
            order = self._answered(job, teacher)
        objective = self.objective(job, student, teacher)
        assert isinstance(objective, DACKLObjective)
        given = self.training(job)
        if objective.writes and config.text == "adaptive" and "val" in job.splits:
            objective.phi.observe(float(job.evaluate(student, "val")["loss"]))
            steps = steps_of(order, None, None, job.budget)
            given["validate_every"] = max(1, steps // config.evaluations)
        asked = teacher if objective.wants and not objective.asks else None
        if teacher is not None and objective.pieces:
            teacher.bind(objective.wants, job.task)  # asked by the objective itself
        job.fit("student", objective, order, teacher=asked, **given)
        shown = (
            job.once("corrections", lambda: corrections(job, objective)) if objective.writes else []
        )
        artifact: Artifact = job.model_artifact(objective.export())
        artifact.meta["texts"] = objective.texts.tolist()
        artifact.meta["bands"] = objective.bands.tolist()
        artifact.meta["threshold"] = float(objective.phi.phi)
        artifact.meta["corrections"] = shown
        return artifact

    def _start(self, job: Any, student: Net) -> None:
        """The student's own training on given responses, before it is taught."""
        epochs = self.config.sft_epochs
        if epochs > 0:
            supervised = Supervised(student, job.task)
            share = shared_start(job, epochs)
            job.fit("sft", supervised, self.order(job), epochs=epochs, share=share)

    def _answered(self, job: Any, teacher: Any) -> Any:
        """The training prompts with the teacher's sampled responses in place of the data's."""
        task = job.task
        source = asked_once(job.splits["train"])
        sampler = task.sampler(self.config.max_new, temperature=0.0)

        def answers() -> list[str]:
            found: list[str] = []
            for rows in torch.split(torch.arange(len(source)), 256):
                batch = read_rows(source, rows, None, task.collate)
                found += task.generate(teacher.guest().module, batch, sampler)
            return found

        rows = answered(job, job.once("answers", answers, kind="label"))
        return Shuffled(rows, job.budget.batch, collate=task.collate)

    def details(self, job: Any, artifact: Artifact) -> dict[str, Any]:
        """How much own text was read and corrected, how wide the band was, and corrections."""
        meta = artifact.meta
        by_text = self.config.alignment == "text"
        tables = [own_text_table(meta["texts"], meta["bands"], meta["threshold"], by_text)]
        if meta["corrections"]:
            unit = "word" if by_text else "token"
            tables.append(
                {
                    "title": f"Texts of the finished student, corrected at one {unit}",
                    "columns": ["prompt", "the student's text", f"its {unit}", "the teacher's",
                                "gone on from there"],
                    "rows": meta["corrections"],
                    "caption": "On prompts of the validation data, sampled at the run's "
                    "temperature." + (f" {EXPERIMENTAL}" if by_text else ""),
                }
            )  # fmt: skip
        return {"tables": tables}

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny language models on generated sentences."""
        model = "stillhouse:causal_lm"
        return {
            "method": "dackl",
            "data": {"name": "generated_prompts", "options": {"prompts": 8}},
            "teacher": {"model": model, "options": {"layers": 1, "width": 16, "heads": 2}},
            "student": {"model": model, "options": {"layers": 1, "width": 8, "heads": 1}},
            "settings": {"init_threshold": 0.9, "k": 8, "hidden": 8, "evaluations": 2,
                         "capacity": 12, "max_new": 8},
            "budget": {"steps": 6, "batch": 4, "lr": 0.01},
            "seed": seed,
        }  # fmt: skip


def shared_start(job: Any, epochs: float) -> dict[str, Any] | None:
    """What the student's start depends on: all sides of a comparison then begin with one.

    None where the student was handed in as an object, which has no name.
    """
    spec = job.recipe.student
    if spec is None or spec.model is None or spec.model == GIVEN:
        return None
    return {
        "path": job.path,  # the initial weights are drawn by it
        "model": [spec.model, spec.options, spec.weights],
        "budget": job.budget.model_dump(exclude={"epochs", "steps"}),
        "epochs": epochs,
        "data": job.splits["train"].fingerprint,
        "vocabulary": job.task.vocabulary.size,
        "precision": job.hardware.precision,
        "seed": job.seed,
        "version": __version__,
    }


def answered(job: Any, answers: list[str]) -> PromptRows:
    """The training rows with one answer to each different prompt in place of their responses.

    Args:
        job: of the run.
        answers: in the order in which prompts first occur.
    """
    source, task = job.splits["train"], job.task
    read = [
        read_rows(source, rows, None, task.collate)
        for rows in torch.split(torch.arange(len(source)), 1024)
    ]
    prompts = [prompt for batch in read for prompt in batch["prompt"]]
    said = dict(zip(dict.fromkeys(prompts), answers, strict=True))
    asked = [(b["attention_mask"] & ~b["response_mask"]).sum(1).max() for b in read]
    references = [tuple(known) for batch in read for known in batch["references"]]
    return PromptRows(
        [Pair(p, said[p], known) for p, known in zip(prompts, references, strict=True)],
        task.tokens,
        length=int(task.about["input"]["length"]),
        prompt_length=int(torch.stack(asked).max()),
        ids=torch.cat([batch["id"] for batch in read]),
        name="answers of the teacher",
    )


# ---- what the report shows ------------------------------------------------------------------


def own_text_table(
    texts: Any, bands: Any, threshold: float, by_text: bool = False
) -> dict[str, Any]:
    """The training in tenths: which text it read, and what of the teacher's mass it kept."""
    rows = []
    for part, (text, band) in enumerate(zip(texts, bands, strict=True), 1):
        steps, fresh, replayed, own, corrected = text
        tokens, mass, size, loss = band
        if not steps and not tokens:
            continue
        rows.append(
            [
                f"{part}/{len(texts)}",
                f"{fresh:.0f}",
                f"{replayed:.0f}",
                f"{steps - fresh - replayed:.0f}",
                f"{corrected / own:.1%}" if own else "",
                f"{size / tokens:.1f}" if tokens else "",
                f"{mass / tokens:.4f}" if tokens else "",
                f"{loss / tokens:.4f}" if tokens else "",
            ]
        )
    return {
        "title": "Text and band over the training",
        "columns": ["part", "steps on fresh text", "replayed", "given", "fresh rows corrected",
                    "classes kept", "mass kept", "divergence"],
        "rows": rows,
        "caption": f"The share of own text ended at {threshold:.2f}."
        + (f" {EXPERIMENTAL}" if by_text else ""),
    }  # fmt: skip


def corrections(job: Any, objective: DACKLObjective, count: int = 8) -> list[list[str]]:
    """What one round of correction makes of texts that the finished student writes."""
    task = job.task
    if "val" not in job.splits or objective.config.scrg_rounds == 0:
        return []
    source = asked_once(job.splits["val"])
    spread_over = torch.linspace(0, len(source) - 1, min(count, len(source))).long()
    batch = read_rows(source, spread_over, None, task.collate).to(job.device)
    size = objective.sampler.max_new
    chances = [
        torch.rand(batch.size, size, generator=job.rng("corrections", n)).to(job.device)
        for n in range(2)
    ]
    first = written(
        objective.student, batch, objective.sampler, chances[0], longest=objective.longest
    )
    found = objective.revise(first, batch["prompt"], chances[1])
    shown = []
    for row in range(batch.size):
        texts = [
            task.tokens.text(rows["tokens"][row], rows["response_mask"][row])
            for rows in (first, found.rows)
        ]
        shown.append(
            [batch["prompt"][row], texts[0], *_replaced(task, first, found, row), texts[1]]
        )
    return shown


def _replaced(task: Any, first: Batch, found: Revised | Reworded, row: int) -> list[str]:
    """What stood at the corrected place, and what stands there now."""
    if isinstance(found, Reworded):
        return list(found.words[row])
    place = int(found.position[row])
    if place < 0:
        return ["", ""]
    return [
        task.tokens.tokenizer.decode([int(rows["tokens"][row, place])])
        for rows in (first, found.rows)
    ]
