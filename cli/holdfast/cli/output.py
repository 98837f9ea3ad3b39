"""What the verbs write to stdout: JSON objects and plain tables. Progress and errors go to stderr, not through here."""

import json
import sys
from collections.abc import Mapping, Sequence


def emit(text: str) -> None:
    """Write text and a line's end to stdout."""
    sys.stdout.write(text + "\n")


def emit_json(schema: str, fields: Mapping[str, object]) -> None:
    """Write one JSON object to stdout; `schema` names its shape and version and comes first."""
    emit(json.dumps({"schema": schema, **fields}, indent=2, allow_nan=False))


def pairs(rows: Sequence[tuple[str, str]], *, indent: str = "  ") -> str:
    """Lines of a name and what it is, aligned. A text of several lines goes on under its column."""
    width = max((len(name) for name, _ in rows), default=0)
    lines = []
    for name, text in rows:
        first, *others = text.split("\n")
        lines.append(f"{indent}{name:<{width}}  {first}".rstrip())
        lines.extend(f"{indent}{'':<{width}}  {other}" for other in others)
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    """A plain table under a header, columns aligned to the left."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join((indent + line).rstrip() for line in lines)
