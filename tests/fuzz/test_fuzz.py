"""A few thousand pieces of nonsense; `make fuzz INPUTS=1000000` for as many as one likes."""

import secrets

import pytest
from fuzz import fuzz
from fuzz.fuzz import SHARES, BrokenRuleError, Fuzzer

INPUTS = 2000
RARELY_TAKEN = {"service manager", "durable copies"}  # a few inputs each, of which hardly any is good
NEVER_REFUSED = {"keeper and worker"}  # what is not understood is left


def test_any_bytes_are_taken_or_refused_by_name_and_leave_a_core_whole() -> None:
    for seed in (1, secrets.randbelow(1 << 32)):
        fuzzer = Fuzzer(seed)
        fuzzer.run(INPUTS)
        for name, told in fuzzer.told.items():
            assert told.inputs >= INPUTS * SHARES[name] // 100
            assert told.ends[""] > 0 or name in RARELY_TAKEN, f"nothing is taken: {fuzzer.report()}"
            assert told.inputs > told.ends[""] or name in NEVER_REFUSED, f"nothing is refused: {fuzzer.report()}"


def test_an_input_that_costs_too_much_is_named_with_the_command_that_brings_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fuzz, "CPU_S_MAX", 0.0)
    with pytest.raises(BrokenRuleError, match=r"fuzz\.fuzz --inputs \d+ --seed 5 --round 0'.* s of CPU for"):
        Fuzzer(5).run(100)


def test_growth_within_a_batch_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "BATCH_GROWTH_BYTES_MAX", -1)
    with pytest.raises(BrokenRuleError, match="bytes of growth within"):
        Fuzzer(5).run(100)
