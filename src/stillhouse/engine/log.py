"""What a run writes down: `log.jsonl`, progress on the terminal, optional loggers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from stillhouse.errors import MissingExtra, RecipeError


class RunLog:
    """The run's log: one JSON object a line, always; and whatever loggers are asked for.

    Args:
        folder: of the run; `log.jsonl` is appended to.
        enabled: False on all processes but the first.
        loggers: names among tensorboard, wandb, mlflow.
        progress: show progress on the terminal.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        enabled: bool = True,
        loggers: tuple[str, ...] = (),
        progress: bool = False,
    ) -> None:
        self._file: TextIO | None = None
        if folder is not None and enabled:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.loggers = [open_logger(name, folder) for name in loggers] if enabled else []
        self.progress = Progress() if progress and enabled else None

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; it is on disk after the next `flush`."""
        if self._file is not None:
            line = {"event": event, "time": round(time.time(), 3), **fields}
            self._file.write(json.dumps(line, default=_plain) + "\n")
        if event == "warning" and self.progress is not None:
            self.progress.say(f"warning: {fields.get('text', '')}")

    def step(self, stage: str, step: int, figures: Mapping[str, float], **fields: Any) -> None:
        """The means of the terms since the last such line."""
        self.write("step", stage=stage, step=step, terms=dict(figures), **fields)
        for logger in self.loggers:
            logger.scalars({f"{stage}/{k}": v for k, v in figures.items()}, step)

    def validation(self, stage: str, step: int, scores: Mapping[str, float], **fields: Any) -> None:
        """The figures of a validation."""
        self.write("validation", stage=stage, step=step, scores=dict(scores), **fields)
        for logger in self.loggers:
            logger.scalars({f"{stage}/val/{k}": v for k, v in scores.items()}, step)

    def flush(self) -> None:
        """Hand what was written to the operating system; done before every checkpoint."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Flush and close everything."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for logger in self.loggers:
            logger.close()
        if self.progress is not None:
            self.progress.close()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


class Progress:
    """Progress of the stage that runs: a bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._stage = ""
        self._shown = 0.0
        self._terminal = sys.stderr.isatty()
        self._every = 0.2 if self._terminal else 10.0
        self._began = 0.0

    def begin(self, stage: str, total: int, start: int = 0) -> None:
        """A stage begins (or goes on at `start`)."""
        self._stage, self._began = stage, time.monotonic()
        self._shown = self._began
        if not self._terminal:
            at = f" from step {start}" if start else ""
            self.say(f"{stage}: {total} steps{at}")
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        self.end()
        from rich.console import Console

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
            auto_refresh=False,
        )
        self._bar.start()
        self._task = self._bar.add_task(stage, total=total, completed=start, figures="")

    def due(self, now: float) -> bool:
        """Whether it is time to show something new."""
        return now - self._shown >= self._every

    def update(self, step: int, total: int, figures: Mapping[str, float], now: float) -> None:
        """Show where the stage stands."""
        self._shown = now
        text = " ".join(f"{k}={v:.4g}" for k, v in list(figures.items())[:4])
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=text, refresh=True)
        else:
            rest = (now - self._began) / max(1, step) * (total - step)
            self.say(f"{self._stage}: {step}/{total}, {rest:.0f} s left {text}")

    def end(self) -> None:
        """The stage is over."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """One plain line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    close = end


class TensorBoard:
    """Scalars for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("tensorboard", "loggers") from error
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        """Log figures at a step."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """Scalars for Weights & Biases; WANDB_MODE and keys come from the environment."""

    def __init__(self, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra("wandb", "loggers") from error
        self._run: Any = wandb.init(project="stillhouse", dir=str(folder), name=folder.name)

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        """Log figures at a step."""
        self._run.log({**figures, "step": step})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class MLflow:
    """Scalars for MLflow; the tracking server comes from the environment."""

    def __init__(self, folder: Path) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise MissingExtra("mlflow", "loggers") from error
        self._mlflow: Any = mlflow
        mlflow.start_run(run_name=folder.name)

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        """Log figures at a step."""
        self._mlflow.log_metrics(dict(figures), step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


Logger = TensorBoard | WeightsAndBiases | MLflow


def open_logger(name: str, folder: Path | None) -> Logger:
    """The logger of that name.

    Raises:
        RecipeError: no such logger.
        MissingExtra: its package is not installed.
    """
    kinds: dict[str, type[Logger]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
        "mlflow": MLflow,
    }
    if name not in kinds or folder is None:
        raise RecipeError(f"unknown logger '{name}'; known: {', '.join(kinds)}")
    return kinds[name](folder)
