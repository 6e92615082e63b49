"""Asking many questions at once: bounded concurrency, retries, a journal, flat memory.

The scheduler knows nothing of HTTP. It is handed an `attempt` (one try at one request) and
keeps a bounded number of them going; a failed one waits its turn in a queue while its place
is used by others, so back-off costs no throughput.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from stillhouse.engine.journal import Journal
from stillhouse.errors import RecipeError, TeacherError
from stillhouse.teacher import Reply, Request, Speaker

Question = tuple[Request, int]
Attempt = Callable[[Request, int], Awaitable[Reply]]
FLAGGED = ("length", "content_filter")
_LISTED = 1000
_BEAT = 0.5  # seconds


class TryAgain(Exception):
    """One attempt failed in a way that another may not.

    Args:
        why: what happened, without secrets.
        after: seconds the server asked us to wait, if it did.
        unreachable: nobody answered at that address at all.
    """

    def __init__(self, why: str, *, after: float | None = None, unreachable: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.after = after
        self.unreachable = unreachable


@dataclass(frozen=True)
class Patience:
    """How failures are met.

    Attributes:
        attempts: tries per request, > 0.
        quick: most seconds before the second try: a single failure is mostly chance.
        first: seconds that back-off begins with; doubled for each further failure.
        longest: most seconds between two tries, Retry-After excepted.
        unreachable: tries before giving up on an address that has never answered.
        lost: requests in a row that use up their tries before all asking stops.
        seed: of the jitter, which is a function of (seed, request, attempt).
    """

    attempts: int = 12
    quick: float = 0.02
    first: float = 0.5
    longest: float = 60.0
    unreachable: int = 4
    lost: int = 5
    seed: int = 0

    def delay(self, key: str, attempt: int, after: float | None) -> float:
        """Seconds to wait after failed try number `attempt` (from 1).

        Exponential back-off with jitter in [1/2, 1); never less than the server asked.
        """
        backoff = min(self.longest, self.first * 2.0 ** (attempt - 1))
        if attempt == 1:
            backoff = min(backoff, self.quick)
        digest = hashlib.blake2b(f"{self.seed}:{key}:{attempt}".encode(), digest_size=8)
        share = 0.5 + int.from_bytes(digest.digest(), "little") / 2.0**65
        return max(backoff * share, after or 0.0)


class Bucket:
    """Token bucket: at most `rate` requests a second, after a burst of `burst`.

    Args:
        rate: per second, > 0; None for no limit.
        burst: how many may go at once.
    """

    def __init__(self, rate: float | None, burst: int = 1) -> None:
        if rate is not None and rate <= 0:
            raise RecipeError(f"a rate limit must be above 0 requests per second, got {rate}")
        self._interval = 0.0 if rate is None else 1.0 / rate
        self._slack = self._interval * max(0, burst - 1)
        self._due = 0.0

    async def take(self) -> None:
        """Wait until one more request may go."""
        if not self._interval:
            return
        now = time.monotonic()
        self._due = max(self._due, now - self._slack) + self._interval
        wait = self._due - self._interval - now
        if wait > 0:
            await asyncio.sleep(wait)


@dataclass
class Tally:
    """What one pass over the questions came to.

    Attributes:
        answered: answers received now.
        remembered: found in the journal.
        attempts: requests sent now, failed ones included.
        retries: why attempts failed, by reason.
        flagged: finish reasons that make an answer doubtful ("length", "content_filter").
        failed: keys without a usable answer, with the last reason (at most 1,000 are listed).
        failures: how many those are.
        uncertain: requests on their way when an earlier process died: may be sent twice.
        seconds: wall time.
    """

    answered: int = 0
    remembered: int = 0
    attempts: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    flagged: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    failures: int = 0
    uncertain: int = 0
    seconds: float = 0.0


def select(
    questions: Iterable[Request | Question],
    *,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
) -> Iterator[Question]:
    """Questions of one shard, at most `limit` of them, one at a time.

    Args:
        questions: requests, or (request, draw).
        limit: most questions, after sharding.
        shard: (i, n): of n equal parts by hash of the key, part i in 0..n-1; a question's
            part does not depend on the others.
    """
    pairs = ((q, 0) if isinstance(q, Request) else q for q in questions)
    if shard is not None:
        part, parts = shard
        pairs = ((r, d) for r, d in pairs if int(r.key(d)[:15], 16) % parts == part)
    return islice(pairs, limit)


def parse_shard(text: str) -> tuple[int, int]:
    """Read "i/n" with i in 0..n-1.

    Raises:
        RecipeError: it says something else.
    """
    left, _, right = text.partition("/")
    if left.isdigit() and right.isdigit() and int(left) < int(right):
        return int(left), int(right)
    raise RecipeError(f"a shard is written i/n with i from 0 to n-1, such as 0/4; got {text!r}")


async def ask_all(
    attempt: Attempt,
    questions: Iterable[Request | Question],
    journal: Journal,
    *,
    concurrency: int = 32,
    patience: Patience = Patience(),
    rate: Bucket | None = None,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    progress: Callable[[Tally], None] | None = None,
) -> Tally:
    """Ask every question that the journal does not hold; write each answer as it comes.

    Memory does not grow with the number of questions (the journal's index excepted): they
    are drawn one at a time, and answers go to the journal.

    Args:
        attempt: one try at one request; raises `TryAgain` when another may succeed.
        questions: requests, or (request, draw); drawn lazily.
        journal: where answers are looked up and written.
        concurrency: requests in flight at once, > 0.
        patience: how failures are met.
        rate: limit of requests per second.
        limit: see `select`.
        shard: see `select`.
        progress: called after every answer or failure, and twice a second; what it raises
            ends the asking.

    Returns:
        The tally. Requests that found no usable answer are listed in it, not raised.

    Raises:
        TeacherError: the endpoint is unreachable, refuses us for good, or several requests
            in a row used up their tries.
    """
    if concurrency < 1:
        raise RecipeError(f"concurrency must be at least 1, got {concurrency}")
    run = _Asking(attempt, journal, patience, rate or Bucket(None), progress, concurrency)
    return await run.through(select(questions, limit=limit, shard=shard), concurrency)


def ask_speaker(
    speaker: Speaker,
    questions: Iterable[Request | Question],
    journal: Journal,
    *,
    concurrency: int = 1,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
) -> Tally:
    """Ask any speaker (a local model, a function) through a journal, synchronously."""
    work = ask_all(
        speaker.ask, questions, journal, concurrency=concurrency, limit=limit, shard=shard
    )
    return asyncio.run(work)


class _Item(NamedTuple):
    """A question, its key, and the number of its next try."""

    key: str
    request: Request
    draw: int
    number: int = 1


class _Asking:
    """The state of one pass: fresh questions, those waiting for another try, the tally."""

    def __init__(
        self,
        attempt: Attempt,
        journal: Journal,
        patience: Patience,
        rate: Bucket,
        progress: Callable[[Tally], None] | None,
        concurrency: int,
    ) -> None:
        self.attempt = attempt
        self.journal = journal
        self.patience = patience
        self.rate = rate
        self.progress = progress
        self.most_waiting = 8 * concurrency
        self.tally = Tally(uncertain=len(journal.uncertain))
        self.waiting: list[tuple[float, int, _Item]] = []
        self.taken: set[str] = set()
        self.pushed = 0
        self.busy = 0
        self.lost_in_a_row = 0
        self.changed = asyncio.Event()

    async def through(self, fresh: Iterator[Question], workers: int) -> Tally:
        start = time.perf_counter()
        beat = asyncio.create_task(self.beat())
        tasks = [beat, *(asyncio.create_task(self.work(fresh)) for _ in range(workers))]
        pending = set(tasks)
        try:
            while pending > {beat}:
                ended, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.journal.flush()
            self.tally.seconds = time.perf_counter() - start
        return self.tally

    async def beat(self) -> None:
        """Tell `progress` now and then, so that it can stop us while nothing answers."""
        while self.progress is not None:
            await asyncio.sleep(_BEAT)
            self.progress(self.tally)
        await asyncio.Event().wait()

    async def work(self, fresh: Iterator[Question]) -> None:
        while True:
            item = self.next_item(fresh)
            if item is not None:
                await self.ask(item)
            elif not self.waiting and not self.busy:
                self.changed.set()
                return
            else:
                await self.pause()

    def next_item(self, fresh: Iterator[Question]) -> _Item | None:
        """A question whose next try is due, else a fresh one."""
        if self.waiting and self.waiting[0][0] <= time.monotonic():
            return heapq.heappop(self.waiting)[2]
        if len(self.waiting) >= self.most_waiting:
            return None
        for request, draw in fresh:
            key = request.key(draw)
            if key in self.taken:
                continue
            if key in self.journal:
                self.tally.remembered += 1
                continue
            self.taken.add(key)
            return _Item(key, request, draw)
        return None

    async def pause(self) -> None:
        """Wait for the next due try, or until another worker has changed something."""
        until = self.waiting[0][0] - time.monotonic() if self.waiting else None
        self.changed.clear()
        try:
            await asyncio.wait_for(self.changed.wait(), until)
        except TimeoutError:
            return

    async def ask(self, item: _Item) -> None:
        self.busy += 1
        try:
            await self.rate.take()
            await self.once(item)
        finally:
            self.busy -= 1
            self.changed.set()
        if self.progress is not None:
            self.progress(self.tally)

    async def once(self, item: _Item) -> None:
        """One try; the answer is written before it counts."""
        self.tally.attempts += 1
        with self.journal.sending(item.key):
            try:
                reply = await self.attempt(item.request, item.draw)
            except TryAgain as failure:
                self.meet(failure, item)
                return
            self.journal.put_reply(
                item.request, item.draw, reply, attempts=item.number, key=item.key
            )
        self.taken.discard(item.key)
        self.lost_in_a_row = 0
        self.tally.answered += 1
        if reply.finish_reason in FLAGGED:
            self.tally.flagged[reply.finish_reason] += 1

    def meet(self, failure: TryAgain, item: _Item) -> None:
        """Queue another try, or give the request up; stop when nothing comes through."""
        self.tally.retries[failure.why] += 1
        never = failure.unreachable and not self.tally.answered
        if never and item.number >= self.patience.unreachable:
            raise TeacherError(f"{failure.why} ({item.number} tries)")
        if item.number < self.patience.attempts:
            wait = self.patience.delay(item.key, item.number, failure.after)
            self.pushed += 1
            later = item._replace(number=item.number + 1)
            heapq.heappush(self.waiting, (time.monotonic() + wait, self.pushed, later))
            return
        self.taken.discard(item.key)
        self.tally.failures += 1
        if len(self.tally.failed) < _LISTED:
            self.tally.failed[item.key] = failure.why
        self.lost_in_a_row += 1
        if self.lost_in_a_row >= self.patience.lost:
            raise TeacherError(
                f"{self.lost_in_a_row} requests in a row found no usable answer in "
                f"{self.patience.attempts} tries each; the last failure: {failure.why}. "
                f"The {len(self.journal)} answers so far are kept: run again to go on"
            )


@dataclass(frozen=True)
class Estimate:
    """What asking would come to, before anything is sent.

    Attributes:
        requests: to be sent.
        remembered: already in the journal.
        prompt_tokens: estimated.
        completion_tokens: at most (the sum of `max_tokens`).
        expected_completion_tokens: at the length the caller expects.
        cost: of the expected, at the given price.
        most: of the most.
    """

    requests: int
    remembered: int
    prompt_tokens: int
    completion_tokens: int
    expected_completion_tokens: int
    cost: float
    most: float


def estimate(
    questions: Iterable[Request | Question],
    *,
    count: Callable[[str], int],
    price: tuple[float, float] = (0.0, 0.0),
    expected: Callable[[Request], int] | None = None,
    journal: Journal | None = None,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
) -> Estimate:
    """A dry run: count requests and tokens, and their price.

    Args:
        questions: requests, or (request, draw).
        count: tokens of a text.
        price: money per million prompt and completion tokens.
        expected: completion tokens expected of a request; its `max_tokens` when None.
        journal: answers that need not be asked for.
        limit: see `select`.
        shard: see `select`.
    """
    sent = remembered = prompt = most = likely = 0
    for request, draw in select(questions, limit=limit, shard=shard):
        if journal is not None and request.key(draw) in journal:
            remembered += 1
            continue
        sent += 1
        # Chat formats add about four tokens a message.
        prompt += sum(count(m["content"]) + 4 for m in request.messages)
        most += request.max_tokens
        likely += min(expected(request), request.max_tokens) if expected else request.max_tokens
    return Estimate(
        requests=sent,
        remembered=remembered,
        prompt_tokens=prompt,
        completion_tokens=most,
        expected_completion_tokens=likely,
        cost=(prompt * price[0] + likely * price[1]) / 1e6,
        most=(prompt * price[0] + most * price[1]) / 1e6,
    )


def body_key(body: object) -> str:
    """sha256 of a request body as it is sent, whatever the order of its fields."""
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
