"""Single values: sizes, addresses, names, and the table of settings."""

import pytest
from holdfast.coding import engine_names
from holdfast.protocol.config import ClusterConfig
from holdfast.protocol.settings import (
    ENGINE_NAMES,
    SETTINGS,
    closest,
    describe,
    format_bytes,
    read_name,
    read_size,
    read_text,
    split_address,
)
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("given_size", "size_bytes"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("4096B", 4096),
        ("64KiB", 64 << 10),
        ("512MiB", 512 << 20),
        (" 8 GiB ", 8 << 30),
        ("1.5gib", 3 << 29),
        ("2TiB", 2 << 40),
        ("0.1KiB", 102),
    ],
)
def test_sizes(given_size: object, size_bytes: int) -> None:
    assert read_size(given_size) == size_bytes


@pytest.mark.parametrize(
    ("given_size", "words"),
    [
        (-1, "0 bytes or more, found -1"),
        (True, "found true"),
        (1.5, "found 1.5"),
        ("", "such as"),
        ("GiB", "such as"),
        ("-1GiB", "such as"),
        ("8GB", "did you mean GiB?"),
        ("8g", "did you mean GiB?"),
        ("8 bananas", "'bananas'"),
        ("1e3", "such as"),
        ("9" * 30, "such as"),
    ],
)
def test_sizes_that_are_none(given_size: object, words: str) -> None:
    with pytest.raises(ValueError, match="found") as caught:
        read_size(given_size)
    assert words in str(caught.value)


@given(st.integers(0, 1 << 20), st.sampled_from([0, 10, 20, 30, 40]))
def test_a_shown_size_that_is_exact_reads_back(count: int, shift: int) -> None:
    shown = format_bytes(count << shift)
    if "." not in shown:
        assert read_size(shown) == count << shift


def test_sizes_are_shown_in_the_largest_unit() -> None:
    shown = [format_bytes(size) for size in (0, 1023, 1024, 1 << 20, 3 << 29, (1 << 40) + 1)]
    assert shown == ["0B", "1023B", "1KiB", "1MiB", "1.50GiB", "1.00TiB"]


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("node-1:7000", "node-1", 7000),
        ("10.0.0.1:1", "10.0.0.1", 1),
        ("[::1]:65535", "::1", 65535),
        ("[fe80::1%eth0]:7000", "fe80::1%eth0", 7000),
    ],
)
def test_addresses(address: str, host: str, port: int) -> None:
    assert split_address(address) == (host, port)


@pytest.mark.parametrize(
    "address",
    ["", "host", "host:", ":7000", "host:0", "host:65536", "host:７", "::1:7", "[host:7000", "a b:1", 7000],
)
def test_addresses_that_are_none(address: object) -> None:
    with pytest.raises(ValueError, match="found"):
        split_address(address)


@pytest.mark.parametrize("name", ["", ".", "-a", "a/b", "a b", "ä", "a" * 65, 3, None])
def test_names_that_are_none(name: object) -> None:
    with pytest.raises(ValueError, match="letters"):
        read_name(name)


@pytest.mark.parametrize("text", ["", "  ", "a\nb", "a\0b", 3])
def test_texts_that_are_none(text: object) -> None:
    with pytest.raises(ValueError, match="one line"):
        read_text(text)


def test_found_values_are_described_in_a_line() -> None:
    values: tuple[object, ...] = (True, 3, "x", {}, [], None)
    assert [describe(value) for value in values] == [
        "true",
        "3",
        "the text 'x'",
        "a table",
        "a list",
        "None",
    ]
    assert len(describe("x" * 1000)) < 80


def test_a_typing_mistake_finds_what_was_meant() -> None:
    assert closest("partiy", ["parity", "name"]) == "parity"
    assert closest("zzz", ["parity", "name"]) is None


def test_the_table_and_the_record_agree() -> None:
    fields = ClusterConfig.__dataclass_fields__
    assert {setting.field for setting in SETTINGS} == set(fields) - {"nodes"}
    for setting in SETTINGS:
        if not setting.required:
            assert fields[setting.field].default == setting.default
            assert setting.default is None or setting.read(setting.default) == setting.default


def test_flags_and_variables_are_unique() -> None:
    assert len({setting.flag for setting in SETTINGS}) == len(SETTINGS)
    assert len({setting.environment_name for setting in SETTINGS}) == len(SETTINGS)


def test_every_engine_can_be_named() -> None:
    assert {"auto", *engine_names()} <= set(ENGINE_NAMES)
