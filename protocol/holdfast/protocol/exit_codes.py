"""How a command ends: the exit codes and the error that carries one. Scripts branch on them, so none is ever reused."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of every `holdfast` command. Part of the public surface."""

    DONE = 0
    BUG = 1  # anything that has no code of its own: a fault of Holdfast
    USAGE = 2  # arguments or config; also what argparse uses
    NOT_RECOVERABLE = 3  # more was lost than parity covers
    UNREACHABLE = 4  # no daemon answered
    WRONG_CLUSTER = 5  # another cluster, epoch or key
    BAD_DIGEST = 6  # bytes that are not what was staged
    OVER_BUDGET = 7  # more memory needed than was agreed


class OperatorError(Exception):
    """Something that the person who runs the command can put right.

    The message says what was expected, what was found, and ends with what to do next. It is shown
    as it is, without a traceback.

    Attributes:
        exit_code: the exit status of a command that ends with this error.
    """

    def __init__(self, exit_code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code
