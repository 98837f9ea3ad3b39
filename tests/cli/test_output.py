"""Plain tables and JSON on stdout."""

import json

import pytest
from holdfast.cli.output import emit, emit_json, pairs, table


def test_pairs_align_and_go_on_under_their_column() -> None:
    assert pairs([("a", "1"), ("bcd", "2\n3")]) == "  a    1\n  bcd  2\n       3"
    assert pairs([]) == ""


def test_tables_align_without_trailing_spaces() -> None:
    assert table(["x", "yy"], [["long", ""], ["s", "t"]], indent="") == "x     yy\nlong\ns     t"


def test_json_names_its_schema_first(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json("holdfast.test/1", {"b": 1, "a": [2]})
    out = capsys.readouterr().out
    assert list(json.loads(out)) == ["schema", "b", "a"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        emit_json("holdfast.test/1", {"x": float("nan")})


def test_text_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    emit("x")
    assert capsys.readouterr().out == "x\n"
