"""Labelling by a speaker: the recipe's endpoint is asked, every answer is kept, once.

Answers lie in the cache, in one journal per speaker, so that other runs, seeds and sides of a
comparison that ask the same question find the answer there; a run folder only notes that the
stage is finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stillhouse.engine.job import Job, locked
from stillhouse.engine.journal import Journal, Price
from stillhouse.engine.loop import Stage
from stillhouse.errors import CheckpointError, RecipeError, TeacherError
from stillhouse.teacher import Request
from stillhouse.teachers.asking import Estimate, Patience, Question, Tally, parse_shard
from stillhouse.teachers.endpoint import Endpoint
from stillhouse.teachers.local_server import LocalServer

_FAILURES = ("429", "500", "drop", "garbage", "empty")


def endpoint_of(recipe: Any) -> Any:
    """The recipe's endpoint section.

    Raises:
        RecipeError: the teacher is not an endpoint, or there is none.
    """
    teacher = recipe.teacher
    if teacher is None or teacher.endpoint is None:
        found = "names no teacher" if teacher is None else f"gives the teacher as {teacher.source}"
        raise RecipeError(
            f"'{recipe.method}' asks its teacher in words, and the recipe {found}; add teacher: "
            "{endpoint: {base_url: http://host:port/v1, model: ...}}, or {endpoint: {serve: "
            "{rule: package.module:function}}} for a server that the run starts"
        )
    return teacher.endpoint


@contextlib.contextmanager
def speaking(recipe: Any) -> Iterator[Endpoint]:
    """The recipe's endpoint, with its local server running inside the block if it has one."""
    spec = endpoint_of(recipe)
    with contextlib.ExitStack() as opened:
        url = spec.base_url
        if spec.serve is not None:
            url = opened.enter_context(LocalServer(**server_settings(spec.serve))).url
        yield open_endpoint(spec, url)


def open_endpoint(spec: Any, base_url: str) -> Endpoint:
    """An endpoint as its section of a recipe says."""
    return Endpoint(
        base_url,
        model=spec.model,
        key_env=spec.key_env,
        key_header=spec.key_header,
        query=spec.query,
        concurrency=spec.concurrency,
        rate=spec.rate,
        burst=spec.burst,
        timeout=spec.timeout,
        patience=Patience(attempts=spec.attempts),
        accept_empty=spec.accept_empty,
        price=Price(spec.price.prompt, spec.price.completion),
    )


def server_settings(serve: Any) -> dict[str, Any]:
    """Settings of the local server; `fail` is spread over the kinds of failure."""
    shares = {kind: serve.fail / len(_FAILURES) for kind in _FAILURES} if serve.fail else {}
    given = {name: getattr(serve, name) for name in ("rule", "replay", "model", "encoder")}
    return {**given, **shares, **serve.options}


def speaker_name(recipe: Any) -> str:
    """What tells one speaker's answers from another's: 20 hexadecimal digits.

    The model's name enters, the fingerprint that the recipe gives, and what a server of our
    own answers from (the code of a rule included). The address enters only where neither name
    nor fingerprint is given: a server may move, and what it has answered stays paid for.
    """
    spec, teacher = endpoint_of(recipe), recipe.teacher
    facts: dict[str, Any] = {"model": spec.model, "fingerprint": teacher.fingerprint}
    if spec.serve is not None:
        serve = spec.serve
        facts |= {"model": serve.model, "rule": serve.rule, "options": serve.options.get("options")}
        if serve.rule is not None:
            facts["code"] = _hash(_source_of(serve.rule))
        if serve.encoder is not None:
            facts["encoder"] = serve.encoder
        if serve.replay is not None:
            facts["replay"] = _hash(Path(serve.replay))
    elif teacher.fingerprint is None and "model" not in spec.model_fields_set:
        facts["base_url"] = spec.base_url
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _source_of(rule: str) -> Path | None:
    found = importlib.util.find_spec(rule.partition(":")[0])
    return Path(found.origin) if found is not None and found.origin else None


def _hash(path: Path | None) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else ""


def journal_path(job: Job) -> Path:
    """Where the answers of the recipe's speaker lie."""
    return job.cache / "journals" / f"{speaker_name(job.recipe)}.jsonl"


def label(
    job: Job,
    name: str,
    questions: Callable[[], Iterable[Request | Question]],
    *,
    kind: str = "label",
    total: int = 0,
    limit: int | None = None,
    shard: str | None = None,
) -> dict[str, Any]:
    """Ask the recipe's endpoint every question, as a stage.

    A killed stage goes on with what the journal lacks. Answers are read with `replies`.

    Args:
        job: of the run; only its first process asks.
        name: of the stage.
        questions: makes the questions; called once, read lazily.
        kind: of the stage.
        total: how many questions there are, for the display of progress.
        limit: most questions.
        shard: "i/n": ask part i of n only.

    Returns:
        Figures: answered, remembered, attempts, failures, flagged, tokens, cost, seconds.

    Raises:
        TeacherError: see `Endpoint`; also when requests found no usable answer (the others
            are kept, and the next run asks only for these).
    """
    part = parse_shard(shard) if shard else None
    path = journal_path(job)
    stage = job.stage(name, kind)
    with job.stop.listening():
        if stage.finished:
            figures: dict[str, Any] = stage.result()
        else:
            stage.begin()
            figures = {}
            if job.hardware.is_main:
                with locked(path.with_suffix(".queue"), wait=True), Journal(path) as journal:
                    figures = _ask(job, stage, journal, questions(), total, limit, part)
            job.hardware.barrier()
            figures = stage.finish(job.hardware.broadcast(figures))
    job._done(stage)
    return figures


def _ask(
    job: Job,
    stage: Stage,
    journal: Journal,
    questions: Iterable[Request | Question],
    total: int,
    limit: int | None,
    shard: tuple[int, int] | None,
) -> dict[str, Any]:
    if journal.uncertain:
        job.log.write(
            "warning",
            text=f"{len(journal.uncertain)} requests were on their way when an earlier process "
            "died; they may be sent twice",
        )
    shown = job.log.progress
    if shown is not None:
        shown.begin(stage.label, total)

    def watch(tally: Tally) -> None:
        stage.leave_if_asked()
        now = time.monotonic()
        if shown is not None and shown.due(now):
            tried_again = float(sum(tally.retries.values()))
            done = tally.answered + tally.remembered
            shown.update(done, total, {"tried again": tried_again}, now)

    with speaking(job.recipe) as endpoint:
        tally = endpoint.label(questions, journal, limit=limit, shard=shard, progress=watch)
        account = journal.account(endpoint.price)
    if shown is not None:
        shown.end()
    if tally.failures:
        why = next(iter(tally.failed.values()))
        raise TeacherError(
            f"{tally.failures} of the requests of stage '{stage.label}' found no usable answer "
            f"(such as: {why}); {len(journal)} answers are kept in {journal.path}. Run the same "
            "command again to ask for the others only"
        )
    stage.figures.update(answered=tally.answered, attempts=tally.attempts)
    return {
        "answered": tally.answered,
        "remembered": tally.remembered,
        "attempts": tally.attempts,
        "uncertain": tally.uncertain,
        "flagged": dict(tally.flagged),
        "retries": dict(tally.retries),
        "prompt_tokens": account.prompt_tokens,
        "completion_tokens": account.completion_tokens,
        "cost": account.cost,
        "seconds": round(tally.seconds, 3),
    }


@contextlib.contextmanager
def replies(job: Job) -> Iterator[Journal]:
    """The journal of the recipe's speaker, for reading."""
    with Journal(journal_path(job), write=False) as journal:
        yield journal


def answer_in(journal: Journal, request: Request, draw: int = 0) -> Mapping[str, Any]:
    """The entry of a request that a finished stage has asked.

    Raises:
        CheckpointError: it is not there any more.
    """
    key = request.key(draw)
    if key not in journal:
        raise CheckpointError(
            f"{journal.path} lacks an answer that this run has had; was the cache cleared? Run "
            "with --redo and the name of the labelling stage to ask again"
        )
    return journal[key]


def dry_run(
    job: Job,
    questions: Iterable[Request | Question],
    *,
    limit: int | None = None,
    shard: str | None = None,
) -> Estimate:
    """What labelling would come to: requests, tokens, money. Nothing is sent."""
    from stillhouse.parts.text_spans import count_tokens
    from stillhouse.teachers.asking import estimate

    spec, path = endpoint_of(job.recipe), journal_path(job)
    known = Journal(path, write=False) if path.exists() else None
    with contextlib.closing(known) if known is not None else contextlib.nullcontext():
        return estimate(
            questions,
            count=count_tokens,
            price=(spec.price.prompt, spec.price.completion),
            expected=lambda request: count_tokens(request.messages[-1]["content"]),
            journal=known,
            limit=limit,
            shard=parse_shard(shard) if shard else None,
        )
