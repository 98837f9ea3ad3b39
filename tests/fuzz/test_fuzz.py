"""A few thousand pieces of nonsense by default; `python tests/fuzz/fuzz.py --inputs 1000000` for a night's worth."""

import secrets

from fuzz.fuzz import Fuzzer


def test_any_bytes_are_taken_or_refused_by_name_and_leave_a_core_whole() -> None:
    for seed in (1, secrets.randbelow(1 << 32)):
        fuzzer = Fuzzer(seed)
        fuzzer.run(2000)
        assert fuzzer.ends["taken"] > 100
        assert fuzzer.ends["malformed"] > 100
