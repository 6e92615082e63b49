"""The one loop: a resumable sequence of steps over a state.

Training, synthesis of pixels, capture and rounds are this loop with another body. What
belongs to every loop is written here once: checkpoints and resume, signals, log, progress.
"""

from __future__ import annotations

import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from stillhouse.clock import Clock
from stillhouse.engine.checkpoint import Rotation, read_state, write_state
from stillhouse.engine.hardware import Hardware
from stillhouse.engine.log import RunLog
from stillhouse.errors import CheckpointError, Interrupted

STAMP = "stamp.state"


class State(Protocol):
    """Anything that can be saved: `state_dict` of tensors, numbers, strings and nests of them."""

    def state_dict(self) -> dict[str, Any]:
        """What is saved."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Go on from what was saved."""
        ...


class StopRequest:
    """SIGINT and SIGTERM ask the run to save and leave; a second one kills it."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._old: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals inside the block (only in a main thread, as Python demands)."""
        if threading.current_thread() is not threading.main_thread() or self._old:
            yield self
            return
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            self._old[number] = signal.signal(number, self._handle)
        try:
            yield self
        finally:
            for number, handler in self._old.items():
                signal.signal(number, handler)
            self._old = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = number


class Stage:
    """A named, resumable piece of a run, in its own folder.

    Args:
        name: unique under its path.
        kind: train, capture, label, closed, synthesis or judge, for log and report.
        folder: where its state lies.
        path: the stage's path within the run, part of every seed.
        stamp: what must be equal when the stage is resumed (steps, data, teacher, shapes).
        anew: what an earlier run left here does not count; `forget` removes it.
        elsewhere: what it makes lies elsewhere and tells how far it is, so that the files here
            may be lost: they are not waited for, and damaged ones are removed.

    Raises:
        CheckpointError: the folder holds a stage with another stamp.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        folder: Path,
        path: tuple[str, ...],
        *,
        log: RunLog,
        hardware: Hardware,
        stop: StopRequest,
        stamp: Mapping[str, Any] | None = None,
        checkpoint_seconds: float = 60.0,
        keep: int = 2,
        anew: bool = False,
        elsewhere: bool = False,
    ) -> None:
        self.name, self.kind, self.folder, self.path = name, kind, folder, path
        self.anew, self.elsewhere = anew, elsewhere
        self.log, self.hardware, self.stop = log, hardware, stop
        self.rotation = Rotation(folder, keep)
        self.checkpoint_seconds = checkpoint_seconds
        self.seconds = 0.0
        self.figures: dict[str, Any] = {}
        self._began = time.monotonic()
        self._saved = self._began
        if elsewhere:
            self._drop_damaged()
        self._check_stamp(dict(stamp or {}))

    @property
    def label(self) -> str:
        """The stage's full name for people."""
        return "/".join(self.path)

    def _check_stamp(self, stamp: dict[str, Any]) -> None:
        path = self.folder / STAMP
        if path.exists() and not self.anew:
            old = self._read(path)
            changed = sorted(k for k in {*old, *stamp} if old.get(k) != stamp.get(k))
            if changed and self._left_nothing():
                # It was refused before its first step.
                self._write_stamp(stamp)
            elif changed:
                told = ", ".join(f"{k}: {old.get(k)!r} -> {stamp.get(k)!r}" for k in changed)
                raise CheckpointError(
                    f"the stage '{self.label}' in {self.folder} was begun differently ({told}); "
                    f"run with --redo {shlex.quote(self.name)} to begin it anew"
                )
        else:
            self._write_stamp(stamp)

    def _write_stamp(self, stamp: dict[str, Any]) -> None:
        if self.hardware.is_main:
            write_state(self.folder / STAMP, stamp, synced=not self.elsewhere)

    def _drop_damaged(self) -> None:
        if self.hardware.is_main:
            for path in (self.folder / STAMP, self.result_path):
                try:
                    read_state(path)
                except CheckpointError:
                    path.unlink(missing_ok=True)
        self.hardware.barrier()

    def _left_nothing(self) -> bool:
        return all(file.name in {STAMP, "lock"} for file in self.folder.iterdir())

    def _read(self, path: Path) -> Any:
        try:
            return read_state(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}. Run with --redo {shlex.quote(self.name)} to run the stage "
                f"'{self.label}' and all after it again"
            ) from error

    @property
    def result_path(self) -> Path:
        """The file whose presence says that the stage is finished."""
        return self.folder / "finished.state"

    @property
    def finished(self) -> bool:
        """Whether it has been run to its end."""
        return self.hardware.broadcast(self.result_path.exists()) is True

    def forget(self) -> None:
        """Remove the result and the checkpoints of an earlier run, where they do not count."""
        if self.anew and self.hardware.is_main:
            self.result_path.unlink(missing_ok=True)
            self.rotation.clear()

    def begin(self) -> None:
        """Note in the log that the stage begins or goes on."""
        self._began = self._saved = time.monotonic()
        self.log.write("stage", stage=self.label, kind=self.kind, state="begin")

    def result(self) -> Any:
        """What the finished stage returned, read back."""
        stored = self._read(self.result_path)
        self.seconds = stored["seconds"]
        self.figures = stored["figures"]
        self.log.write(
            "stage",
            stage=self.label,
            kind=self.kind,
            state="reloaded",
            seconds=self.seconds,
            **self.figures,
        )
        return stored["result"]

    def finish(self, result: Any) -> Any:
        """Store the result, drop the checkpoints, and return the result as read back."""
        self.seconds += time.monotonic() - self._began
        if self.hardware.is_main:
            write_state(
                self.result_path,
                {"result": result, "seconds": self.seconds, "figures": self.figures},
                synced=not self.elsewhere,
            )
            self.rotation.clear()
        self.hardware.barrier()
        self.log.write(
            "stage",
            stage=self.label,
            kind=self.kind,
            state="end",
            seconds=round(self.seconds, 3),
            **self.figures,
        )
        self.log.flush()
        return read_state(self.result_path)["result"]

    def restore(self) -> dict[str, Any] | None:
        """The newest whole checkpoint; damaged ones are told in the log and passed over."""
        saved, troubles = self.rotation.latest()
        for trouble in troubles:
            self.log.write("warning", text=f"{trouble}; the checkpoint before it is used")
        if saved is not None:
            self.seconds = saved["seconds"]
            self.figures = saved["figures"]
        return dict(saved) if saved is not None else None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint of a whole number of steps."""
        now = time.monotonic()
        self.log.flush()
        if self.hardware.is_main:
            spent = self.seconds + now - self._began
            saved = {"step": step, "state": state, "seconds": spent, "figures": self.figures}
            self.rotation.save(step, saved)
        self._saved = now

    def due(self, now: float) -> bool:
        """Whether a checkpoint is due or the run was asked to stop."""
        return self.stop.asked is not None or now - self._saved >= self.checkpoint_seconds

    def leave_if_asked(self) -> None:
        """Raise `Interrupted` when a signal asked the run to stop."""
        if self.stop.asked is not None:
            self.log.write("warning", text=f"stopped by signal {self.stop.asked}; state saved")
            self.log.flush()
            left = Interrupted(
                f"stopped in stage '{self.label}'; everything is saved: "
                "run the same command again to go on"
            )
            left.signal = int(self.stop.asked)
            raise left


def loop(
    stage: Stage,
    state: State,
    body: Callable[[Any, Clock], Any],
    total: int,
    clock: Clock,
    *,
    figures: Callable[[], Mapping[str, float]] | None = None,
    before_save: Callable[[], None] | None = None,
    ended: Callable[[], bool] | None = None,
) -> None:
    """Run `body(state, clock)` for steps [0, total), from the last checkpoint on.

    Args:
        stage: where it is saved; the caller finishes it.
        state: what the body changes.
        body: one step. It may change nothing but `state`, and may read only `state`, the
            clock, and what is fixed: then a killed run ends as an uninterrupted one does.
        total: number of steps.
        clock: moved by the loop; its epoch fields are the body's to keep.
        figures: for the progress display, asked for only when it is shown.
        before_save: called before each checkpoint, such as a pending finite check.
        ended: asked after each step whether the rest is left out; a function of the state.
    """
    saved = stage.restore()
    start = 0
    if saved is not None:
        state.load_state_dict(saved["state"])
        start = int(saved["step"])
        stage.log.write("resumed", stage=stage.label, step=start)
    clock.total = total
    progress = stage.log.progress
    if progress is not None:
        progress.begin(stage.label, total, start)
    many = stage.hardware.world > 1
    for step in range(start, total):
        clock.step = step
        body(state, clock)
        if ended is not None and ended():
            break
        now = time.monotonic()
        if progress is not None and progress.due(now):
            progress.update(step + 1, total, figures() if figures else {}, now)
        due = stage.due(now)
        if many:
            # Processes must agree, which costs a message: every tenth step is often enough.
            due = step % 10 == 9 and stage.hardware.any(due)
        if due and (step + 1 < total or stage.stop.asked is not None):
            if before_save is not None:
                before_save()
            stage.save(step + 1, state.state_dict())
            if many:
                asked = stage.hardware.any(stage.stop.asked is not None)
                stage.stop.asked = stage.stop.asked or (signal.SIGTERM if asked else None)
            stage.leave_if_asked()
    if before_save is not None:
        before_save()
    if progress is not None:
        progress.end()
