"""What the verbs' parsers share: the type of what they are added to, and readers of numbers with bounds."""

import argparse
from collections.abc import Callable
from typing import Protocol

from holdfast.protocol.settings import read_size


class Subparsers(Protocol):
    """What `add_parser` of a verb is given: argparse's collection of subcommands, whose type has a private name."""

    # `help` and `description` are argparse's own names.
    def add_parser(
        self,
        name: str,
        *,
        help: str | None = None,  # noqa: A002
        description: str | None = None,
        epilog: str | None = None,
    ) -> argparse.ArgumentParser:
        """Add the parser of one verb."""
        ...


def whole(lowest: int, highest: int) -> Callable[[str], int]:
    """A reader of whole numbers from `lowest` to `highest`, for argparse's `type`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"expected a whole number from {lowest} to {highest}, found {text!r}")
        return value

    return read


def above_zero(highest: float) -> Callable[[str], float]:
    """A reader of numbers above 0 and at most `highest`, for argparse's `type`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not 0 < value <= highest:  # false for "nan" too
            raise argparse.ArgumentTypeError(f"expected a number above 0 and at most {highest:g}, found {text!r}")
        return value

    return read


def size(text: str) -> int:
    """A reader of sizes such as 512MiB, in bytes, for argparse's `type`."""
    try:
        return read_size(int(text) if text.isascii() and text.isdigit() else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected {error}") from None


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--json`, which every reading verb takes."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, with a schema field")
