"""The frame of the command line: help, exit codes, interruptions, and how little a quick verb imports."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import pytest
from holdfast.cli.main import INTERRUPTED, READER_GONE, VERBS, main
from holdfast.protocol.exit_codes import ExitCode, OperatorError

PROCESS_S = 30.0  # far more than a command takes; a hung one fails here


def holdfast(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "holdfast.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
        check=False,
        env={**os.environ, "COLUMNS": "120", **environment},
    )


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Installs a verb `try` whose `run` is what the test gives."""

    def install(run: Callable[[], int]) -> None:
        module = SimpleNamespace(
            add_parser=lambda subparsers: subparsers.add_parser("try"),
            run=lambda args: run(),
        )
        monkeypatch.setitem(VERBS, "try", ("tests.try", "a verb of this test"))
        monkeypatch.setattr(
            "holdfast.cli.main.import_module", lambda name: module if name == "tests.try" else import_module(name)
        )

    return install


def raiser(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


def test_help_lists_every_verb_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == ExitCode.DONE
    out = capsys.readouterr().out
    for name, (_, summary) in VERBS.items():
        assert name in out
        assert summary.split(",")[0] in " ".join(out.split())
    assert "7 over the memory budget" in " ".join(out.split())


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_in_the_table_is_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == ExitCode.DONE
    assert f"usage: holdfast {name}" in capsys.readouterr().out


def test_version() -> None:
    result = holdfast("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("holdfast 0.")


@pytest.mark.parametrize("arguments", [["conifg"], ["plan"], ["plan", "--nodes", "none"], ["--zzz"], ["keys"]])
def test_bad_usage_ends_with_2_and_words_on_stderr(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error:" in captured.err


def test_no_verb_shows_the_help_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "VERB" in captured.err


@pytest.mark.parametrize("code", list(ExitCode))
def test_an_operators_error_ends_with_its_code_and_no_traceback(
    code: ExitCode, verb: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raiser(OperatorError(code, "expected x, found y; do z")))
    assert main(["try"]) == code
    assert capsys.readouterr().err == "holdfast: expected x, found y; do z\n"


def test_a_verbs_own_status_is_returned(verb: Callable[[Callable[[], int]], None]) -> None:
    verb(lambda: 3)
    assert main(["try"]) == 3


def test_ctrl_c_ends_quietly_with_130(
    verb: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raiser(KeyboardInterrupt()))
    assert main(["try"]) == INTERRUPTED == 130
    assert capsys.readouterr().err == ""


def test_what_nobody_expected_is_called_a_bug_with_its_traceback(
    verb: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raiser(ZeroDivisionError("oops")))
    assert main(["try"]) == ExitCode.BUG
    err = capsys.readouterr().err
    assert err.splitlines()[0] == ("holdfast: this is a bug in Holdfast, please report it: ZeroDivisionError('oops')")
    assert "Traceback" in err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_quietly(unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # nobody reads: the first flush fails
    with os.fdopen(writer, "w") as closed:
        result = subprocess.run(
            [sys.executable, "-m", "holdfast.cli.main", "plan", "--nodes", "4", "--image-gib", "1"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PROCESS_S,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert result.stderr == ""
    assert result.returncode == READER_GONE == 141


def test_another_pipe_that_breaks_is_not_hidden(
    verb: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raiser(BrokenPipeError("a socket of ours")))
    assert main(["try"]) == ExitCode.BUG
    assert "a socket of ours" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--nodes", "8", "--image-gib", "1"]])
def test_a_quick_verb_imports_nothing_slow(arguments: list[str]) -> None:
    script = (
        "import sys; from holdfast.cli.main import main; assert main(sys.argv[1:]) == 0; "
        "slow = {'numpy', 'zmq', 'rich', 'torch', 'msgspec', 'xxhash', 'asyncio'} & set(sys.modules); "
        "sys.exit(f'imported {slow}' if slow else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=PROCESS_S, check=False
    )
    assert result.stderr == ""
    assert result.returncode == 0


def test_a_parser_is_only_made_for_the_verb_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []

    def spy(name: str) -> object:
        imported.append(name)
        return import_module(name)

    monkeypatch.setattr("holdfast.cli.main.import_module", spy)
    assert main(["plan", "--help"]) == 0
    assert imported == ["holdfast.cli.plan"]
