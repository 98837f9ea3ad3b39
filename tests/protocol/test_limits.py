"""Every limit says its unit or what it counts, gives its reason, and fits the others."""

import re
from pathlib import Path

from holdfast.protocol import limits

LINES = Path(limits.__file__).read_text(encoding="utf-8").splitlines()
NAMES = [name for name in vars(limits) if name.isupper()]
UNITS = ("_BYTES", "_S", "_COUNT", "_CHARS", "_CHUNKS", "_KEPT", "_VERSION", "_CREDITS")
QUALIFIERS = ("_MAX", "_MIN")
COUNTED = {
    "DIGESTS_PER_MESSAGE_MAX",
    "WORLD_SIZE_MAX",
    "STEP_MAX",
    "REBUILD_STRIPES_OPEN_MAX",
    "CHUNK_RETRIES_MAX",
    "AGREEMENT_STRIPES_MAX",
    "DRILL_STRIPES",
    "DRILL_STRIPES_MAX",
    "DRILL_PATTERNS",
    "DRILL_COLUMNS",
}


def test_every_limit_ends_in_its_unit_or_is_a_known_count() -> None:
    for name in NAMES:
        bare = name
        for qualifier in QUALIFIERS:
            bare = bare.removesuffix(qualifier)
        assert bare.endswith(UNITS) or name in COUNTED, f"{name}: end it in one of {UNITS}, then {QUALIFIERS}"


def test_every_limit_is_a_positive_number_with_its_reason_beside_it() -> None:
    pair = {"CHUNK_BYTES_MIN", "CHUNK_BYTES_MAX", "HEARTBEAT_S"}  # what they bound says enough
    for name in NAMES:
        value = getattr(limits, name)
        assert isinstance(value, int | float)
        assert value > 0, name
        line = next(line for line in LINES if line.startswith(f"{name} ="))
        assert name in pair or re.search(r"#\s+\S+(\s+\S+){2,}", line), f"{name}: give its reason on its line"


def test_relations_between_limits_are_asserted_where_they_are_defined() -> None:
    asserted = " ".join(line for line in LINES if line.startswith("assert "))
    for name in ("HEARTBEAT_S", "CHUNK_DEADLINE_S", "CHUNK_BYTES_MAX", "LEDGER_BYTES", "COMMIT_PAUSE_S"):
        assert name in asserted, f"{name}: say how it relates to the others"
