"""Numbers on the command line: bounds, and words about what was found."""

import argparse

import pytest
from holdfast.cli.arguments import above_zero, size, whole


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("8", 8), (" 3 ", 3)])
def test_whole_numbers(text: str, value: int) -> None:
    assert whole(1, 8)(text) == value


@pytest.mark.parametrize("text", ["0", "9", "x", "", "1.5"])
def test_whole_numbers_out_of_bounds(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"from 1 to 8, found '{text}'"):
        whole(1, 8)(text)


def test_numbers_above_zero() -> None:
    assert above_zero(10)("0.5") == 0.5
    assert above_zero(10)("10") == 10


@pytest.mark.parametrize("text", ["0", "-1", "10.1", "nan", "inf", "x", ""])
def test_numbers_that_are_not_above_zero(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="above 0 and at most 10"):
        above_zero(10)(text)


def test_sizes() -> None:
    assert size("4096") == 4096
    assert size("2MiB") == 2 << 20
    with pytest.raises(argparse.ArgumentTypeError, match="did you mean GiB"):
        size("2GB")
