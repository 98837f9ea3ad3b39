"""The exit codes are a promise to scripts: this list only grows."""

from holdfast.protocol.exit_codes import ExitCode, OperatorError


def test_codes_never_change() -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "DONE": 0,
        "BUG": 1,
        "USAGE": 2,
        "NOT_RECOVERABLE": 3,
        "UNREACHABLE": 4,
        "WRONG_CLUSTER": 5,
        "BAD_DIGEST": 6,
        "OVER_BUDGET": 7,
    }


def test_an_operators_error_has_its_words_and_its_code() -> None:
    error = OperatorError(ExitCode.UNREACHABLE, "no daemon; start one")
    assert str(error) == "no daemon; start one"
    assert error.exit_code is ExitCode.UNREACHABLE
