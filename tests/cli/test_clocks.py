"""How clocks lie to one another is bounded by questions and answers, and by nothing else."""

import random

from holdfast.cli.clocks import Offset, offset
from holdfast.protocol.trace import NodeTrace, TraceAnswer


def answer(asked_ns: int, read_ns: int, heard_ns: int) -> TraceAnswer:
    return TraceAnswer(1, 0, NodeTrace(read_ns, 0, ()), asked_ns, heard_ns)


def test_one_answer_bounds_by_its_way_there_and_back() -> None:
    assert offset([answer(1000, 51_100, 1300)]) == Offset(ahead_ns=49_950, error_ns=150)
    assert offset([answer(5, 5, 5)]) == Offset(0, 0), "the node that was asked itself"


def test_who_gave_none_has_no_offset() -> None:
    assert offset([TraceAnswer(1, 0, None, 0, 10, "down")]) is None
    assert offset([]) is None


def test_every_further_answer_narrows_and_the_truth_stays_inside() -> None:
    chance = random.Random(7)
    for _ in range(200):
        ahead_ns, now_ns = chance.randrange(-(10**9), 10**9), 2 * 10**9
        answers, before_ns = [], None
        for _ in range(6):
            there_ns, back_ns = chance.randrange(10**6), chance.randrange(10**6)
            answers.append(answer(now_ns, now_ns + there_ns + ahead_ns, now_ns + there_ns + back_ns))
            now_ns += 10**7
            found = offset(answers)
            assert found is not None
            assert abs(found.ahead_ns - ahead_ns) <= found.error_ns + 1
            assert before_ns is None or found.error_ns <= before_ns
            before_ns = found.error_ns


def test_a_clock_that_jumped_between_answers_is_taken_from_the_narrowest() -> None:
    jumped = [answer(0, 1000, 100), answer(200, 9200, 210)]
    assert offset(jumped) == Offset(ahead_ns=8995, error_ns=5)
