"""The door: what it imports, how it tells what goes wrong, exit codes, completion."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stillhouse.cli.main import COMMANDS, build, called_commands
from stillhouse.errors import Interrupted, StillhouseError

START = "from stillhouse.cli.main import main; main()"


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "words", [["--help"], ["methods"], ["methods", "--json"], ["methods", "show", "kd"]]
)
def test_the_door_imports_neither_torch_nor_pydantic(words: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        "heavy = ('torch', 'pydantic', 'numpy', 'rich')\n"
        "atexit.register(lambda: print(*[m for m in heavy if m in sys.modules], file=sys.stderr))\n"
        f"sys.argv = ['stillhouse', *{words!r}]\n{START}"
    )
    done = python(code)
    assert done.returncode == 0
    assert done.stderr.strip() == ""
    assert "kd" in done.stdout or "methods" in done.stdout


def test_import_of_the_package_is_light() -> None:
    done = python(
        "import sys, stillhouse; dir(stillhouse); "
        "print([m for m in ('torch', 'pydantic', 'numpy') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_starts_take_at_most_1_3_times_those_of_a_typer_program_of_one_command(
    tmp_path: Path,
) -> None:
    single = tmp_path / "single.py"
    single.write_text(
        "import typer\napp = typer.Typer()\n\n@app.command()\n"
        "def hello(name: str = 'you') -> None:\n    print(name)\n\napp()\n"
    )
    program = tmp_path / "door.py"
    program.write_text(START)
    lines = {
        "single": [sys.executable, str(single)],
        "help": [sys.executable, str(program), "--help"],
        "methods": [sys.executable, str(program), "methods"],
    }
    best = dict.fromkeys(lines, float("inf"))
    for _ in range(11):
        # Processor time of the quickest start: what others do on the machine hardly counts.
        for name, words in lines.items():
            before = os.times()
            subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
            after = os.times()
            spent = after.children_user + after.children_system
            spent -= before.children_user + before.children_system
            best[name] = min(best[name], spent)
    assert best["help"] <= 1.3 * best["single"] + 0.01
    assert best["methods"] <= 1.3 * best["single"] + 0.01


def test_the_public_names_are_there_whoever_imported_what_first() -> None:
    for first in ("", "import stillhouse.teacher; ", "from stillhouse.launch import run; "):
        done = python(
            f"{first}import stillhouse as still, torch; "
            "t = still.teacher(torch.nn.Linear(3, 2)); "
            "assert 'logits' in t.provides, t.provides; "
            "assert still.objective.Objective and callable(still.objective); "
            "assert all(getattr(still, name) for name in still.__all__)"
        )
        assert done.returncode == 0, done.stderr


def test_an_unknown_public_name_is_told_with_the_nearest() -> None:
    import stillhouse

    with pytest.raises(AttributeError, match="did you mean 'distill'"):
        _ = stillhouse.distil


def test_only_the_called_command_is_built() -> None:
    assert list(called_commands(["methods", "show", "kd"])) == ["methods"]
    assert list(called_commands(["--traceback", "run", "methods"])) == ["run"]
    assert list(called_commands(["--help"])) == []
    assert list(called_commands(["rnu"])) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(call, command: str) -> None:
    done = call(command, "--help")
    assert done.code == 0
    assert f"stillhouse {command}" in done.out
    assert build([command]) is not None


def test_an_unknown_command_names_the_nearest_with_code_2(call) -> None:
    done = call("rnu")
    assert done.code == 2
    assert "'run'" in done.err


def test_missing_and_wrong_arguments_are_usage_errors(call) -> None:
    assert call("run").code == 2
    assert call("bench", "kd", "--seeds", "0").code == 2
    assert call("export", "x", "--to", "onx").code == 2


def test_version(call) -> None:
    from stillhouse import __version__

    assert call("--version").out.strip() == __version__


def test_a_refusal_is_one_message_on_stderr_without_traceback(call) -> None:
    done = call("methods", "show", "supervized")
    assert done == (1, "", "error: unknown method 'supervized'; did you mean 'supervised'?\n")


@pytest.mark.parametrize("where", ["--traceback methods show dk", "methods show dk --traceback"])
def test_a_traceback_is_shown_when_asked_for(call, where: str) -> None:
    with pytest.raises(StillhouseError):
        call(*where.split())


def test_a_traceback_is_shown_by_the_environment() -> None:
    code = f"import sys; sys.argv = ['stillhouse', 'methods', 'show', 'dk']; {START}"
    done = python(code, STILLHOUSE_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RecipeError" in done.stderr


def replace_methods(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> None:
        raise error

    from stillhouse.cli import methods

    monkeypatch.setattr(methods.catalogue, "entries", fail)


def test_an_unforeseen_error_is_one_message_too(call, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_methods(monkeypatch, TypeError("what is this"))
    done = call("methods")
    assert done.code == 1
    assert done.err.startswith("unexpected: TypeError: what is this\n")
    assert "--traceback" in done.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(
    call, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    left = Interrupted("everything is saved: run the same command again to go on")
    left.signal = int(number)
    replace_methods(monkeypatch, left)
    done = call("methods")
    assert done.code == code
    assert done.err == "stopped: everything is saved: run the same command again to go on\n"


def test_control_c_gives_130(call, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_methods(monkeypatch, KeyboardInterrupt())
    assert call("methods").code == 130


def test_a_reader_that_leaves_is_no_error() -> None:
    code = f"import sys; sys.argv = ['stillhouse', 'methods', '--json']; {START}"
    line = f'{sys.executable} -c "{code}" | true; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.strip() in {"0", "1"}


def test_the_shell_completes_commands_and_ids() -> None:
    code = f"import sys; sys.argv = ['stillhouse']; {START}"

    def completed(words: str) -> list[str]:
        asked = {"_STILLHOUSE_COMPLETE": "complete_bash", "COMP_WORDS": words}
        done = python(code, **asked, COMP_CWORD=str(len(words.split()) - 1))
        return done.stdout.split()

    assert completed("stillhouse rep") == ["report"]
    assert "kd" in completed("stillhouse methods show k")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_run_that_goes_on(
    tmp_path: Path, small: Path, number: int, code: int
) -> None:
    line = [sys.executable, "-c", START, "run", str(small), "-o", "budget.steps=60000"]
    line += ["--folder", str(tmp_path / "r")]
    run = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    log = tmp_path / "r" / "log.jsonl"
    for _ in range(600):
        if log.exists() and '"student"' in log.read_text():
            break
        time.sleep(0.1)
    time.sleep(1)
    run.send_signal(number)
    told = run.communicate(timeout=60)[1]
    assert run.returncode == code, told
    assert "run the same command again to go on" in told
    assert "Traceback" not in told
    assert list((tmp_path / "r" / "stages" / "student").glob("step-*.state"))


def test_messages_hold_no_internal_paths(call) -> None:
    done = call("run", "nowhere.yaml")
    assert done.code == 1
    assert not re.search(r"site-packages|File \"", done.err)
