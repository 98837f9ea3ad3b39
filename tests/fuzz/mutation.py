"""Nonsense that knows what it spoils: bytes cut and spliced, values rewritten in place, whole messages made by type.

Everything is drawn from one generator, so a seed and a round replay an input exactly.
"""

import random
from collections.abc import Callable, Sequence
from functools import cache

import msgspec
from msgspec import inspect

NUMBERS = (0, 1, 2, 3, 7, 8, 63, 64, 255, 4095, 4096, 32767, 2**31, 2**32, 2**62, 2**62 + 1, 2**63 - 1, 2**64 - 1, -1)
TEXTS = (
    "",
    "a",
    "b",
    "n0",
    "nobody",
    "x" * 200,
    "data",
    "parity",
    "../../etc",
    "\x00",
    "\u202e\u0661",
    "²",
    "9" * 5000,
)
MARKS = b"\x00\x7f\x80\x90\xa0\xc0\xc1\xc4\xc6\xc9\xcb\xcf\xd3\xd9\xdb\xdc\xdd\xde\xdf\xff"  # of msgpack, mostly
REPEATED_BYTES_MAX = 1 << 20  # a piece of an input is repeated up to this size, which is what a control frame may have
REPEATED_COUNT_MAX = 20_000  # and a list up to so many elements
REPEATED_SHARE = 0.002  # of inputs: large ones take a hundred times as long as the others
NESTING_MAX = 3000  # levels; three times what Python's stack takes


class Mutator:
    """One generator's nonsense."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    # --- bytes ---

    def cut(self, frame: bytes, others: Sequence[bytes]) -> bytes:
        """Bytes with one to four changes; `others` are spliced in."""
        draw, changed = self.draw, bytearray(frame)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(changed) + 1)
            match draw.randrange(7):
                case 0:
                    del changed[place:]
                case 1:
                    changed[place:place] = draw.randbytes(draw.randint(1, 9))
                case 2 if place < len(changed):
                    changed[place] ^= 1 << draw.randrange(8)
                case 3 if place < len(changed):
                    changed[place] = draw.choice(MARKS)
                case 4:
                    del changed[place : place + draw.randint(1, 16)]
                case 5:
                    size = draw.choice((1, 2, 4, 8))
                    changed[place : place + size] = (draw.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
                case _:
                    other = draw.choice(others) if others else frame
                    changed[place:] = other[draw.randrange(len(other) + 1) :]
        if draw.random() < REPEATED_SHARE and changed:
            start = draw.randrange(len(changed))
            piece = changed[start : start + draw.randint(1, 64)]
            changed[start:start] = piece * (draw.randint(1, REPEATED_BYTES_MAX) // len(piece))
        return bytes(changed)

    def lines(self, text: str, others: Sequence[str]) -> str:
        """Text with lines dropped, doubled, moved, taken from elsewhere, or with bytes changed."""
        draw, found = self.draw, text.split("\n")
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(found) + 1)
            other = draw.choice(others).split("\n")
            match draw.randrange(6):
                case 0:
                    del found[place : place + draw.randint(1, 3)]
                case 1:
                    found[place:place] = found[max(place - draw.randint(1, 4), 0) : place]
                case 2:
                    found.insert(place, draw.choice(other))
                case 3 if place < len(found):
                    key, equals, value = found[place].partition("=")
                    found[place] = f"{key}{equals}{draw.choice([self.scalar_text(), value[: len(value) // 2], key])}"
                case 4 if draw.random() < 0.02:
                    found.insert(place, "a = " + draw.choice(["[", "{b=", "[{c="]) * draw.randint(1, NESTING_MAX))
                case _ if place < len(found):
                    found[place] = self.cut(found[place].encode(), [one.encode() for one in other]).decode(
                        errors="replace"
                    )
        return "\n".join(found)

    def scalar_text(self) -> str:
        """Something that may stand for a value in a text."""
        draw = self.draw
        quoted = '"' + draw.choice(TEXTS).replace("\x00", "") + '"'
        return draw.choice((quoted, str(draw.choice(NUMBERS)), "nan", "1e400", "true", "[]", "{}", "1979-05-27", "''"))

    # --- values ---

    def rewrite(self, value: object) -> object:
        """The same tree with one place of it changed."""
        draw = self.draw
        match value:
            case dict():
                if value and draw.random() < 0.08:
                    gone = draw.choice(sorted(value, key=str))
                    return {k: v for k, v in value.items() if k != gone}
                key = draw.choice(sorted(value, key=str)) if value else None
                return {k: self.rewrite(v) if k == key and k != "type" else v for k, v in value.items()}
            case list():
                place = draw.randrange(len(value) + 1)
                again = [self.rewrite(v) if index == place else v for index, v in enumerate(value)]
                if draw.random() < REPEATED_SHARE and again:
                    return again * (draw.randint(1, REPEATED_COUNT_MAX) // len(again))
                return again if draw.random() < 0.8 else again[:place] + again[:place]
            case bool() | None:
                return draw.choice([True, False, None, 1, [0, 0]])
            case int() | float():
                if draw.random() < 0.05:
                    return draw.choice((float("nan"), float("inf"), 1e308, "1", None, [1]))
                return draw.choice(NUMBERS) if draw.random() < 0.5 else value + draw.randint(-3, 3)
            case str():
                return draw.choice(TEXTS) if draw.random() < 0.95 else None
            case bytes():
                return draw.randbytes(8 * draw.randint(0, 40)) if draw.random() < 0.8 else value[:-1]
        return value

    def frame(self, frame: bytes, others: Sequence[bytes]) -> bytes:
        """A msgpack frame, spoiled: mostly value by value, so that it still is a message."""
        if self.draw.random() < 0.35:
            return self.cut(frame, others)
        try:
            value = msgspec.msgpack.decode(frame)
            if isinstance(value, dict) and isinstance(value.get("body"), dict) and self.draw.random() < 0.95:
                value["body"] = self.rewrite(value["body"])
            else:
                value = self.rewrite(value)
            return msgspec.msgpack.encode(value)
        except (msgspec.DecodeError, OverflowError, UnicodeError, ValueError):
            return self.cut(frame, others)


@cache
def type_info(kind: type[msgspec.Struct]) -> inspect.Type:
    """What a type allows; finding it out takes a millisecond."""
    return inspect.type_info(kind)


class Maker:
    """Whole records by their type: every field is one that the type allows, and often one that means something here."""

    def __init__(self, draw: random.Random, pools: dict[str, Callable[[], object]]) -> None:
        """`pools`: field name -> draws a value that means something to who will hear it, as plain data."""
        self.draw, self.pools = draw, pools

    def make(self, kind: type[msgspec.Struct]) -> object:
        """A record as plain data, which encodes to a frame that decodes as `kind`, mostly."""
        return self._value(type_info(kind), "")

    def _value(self, info: inspect.Type, name: str) -> object:  # one line per kind of type
        draw = self.draw
        if name in self.pools and draw.random() < 0.9:
            return self.pools[name]()
        match info:
            case inspect.Metadata():
                return self._value(info.type, name)
            case inspect.StructType():
                values = {field.encode_name: self._value(field.type, field.name) for field in info.fields}
                if info.array_like:
                    return ([info.tag] if info.tag is not None else []) + list(values.values())
                return ({info.tag_field: info.tag} if info.tag_field else {}) | values
            case inspect.UnionType():
                return self._value(draw.choice(info.types), name)
            case inspect.LiteralType():
                return draw.choice(info.values)
            case inspect.BoolType():
                return draw.random() < 0.5
            case inspect.NoneType():
                return None
            case inspect.IntType():
                low, high = info.ge if info.ge is not None else -(1 << 63), info.le or (info.lt or (1 << 63)) - 1
                fit = [number for number in NUMBERS if low <= number <= high]
                return draw.choice(fit) if fit else low
            case inspect.FloatType():
                return draw.choice((0.0, 0.25, 1e9, -1.0, 1e308, float("inf"), float("nan")))
            case inspect.StrType():
                return draw.choice(TEXTS)
            case inspect.BytesType():
                size = draw.choice((info.min_length or 0, info.max_length or 64, 8, 80))
                return draw.randbytes(min(max(size, info.min_length or 0), info.max_length or size))
            case inspect.TupleType():
                return [self._value(each, name) for each in info.item_types]
            case inspect.VarTupleType() | inspect.ListType():
                return [self._value(info.item_type, name) for _ in range(draw.choice((0, 1, 1, 2, 8)))]
            case inspect.TupleType():
                return [self._value(item, name) for item in info.item_types]
            case inspect.DictType():
                return {draw.choice(TEXTS): draw.choice((1, None, "x", [], {}))}
        raise AssertionError(f"no rule for {info}")
