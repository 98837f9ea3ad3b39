import dataclasses

import pytest
from holdfast.coding import MAX_CODE_LENGTH, CodeParams, CodingError


@pytest.mark.parametrize(("k", "m"), [(1, 0), (1, 1), (4, 2), (251, 4), (1, 254), (255, 0)])
def test_every_code_of_the_field_is_accepted(k: int, m: int) -> None:
    assert CodeParams(k, m).total_count == k + m <= MAX_CODE_LENGTH


@pytest.mark.parametrize(
    ("k", "m", "numbers"),
    [(0, 2, "k = 0"), (-1, 2, "k = -1"), (4, -1, "m = -1"), (250, 6, "250 + 6 = 256")],
)
def test_other_shapes_are_refused_with_their_numbers(k: int, m: int, numbers: str) -> None:
    with pytest.raises(CodingError, match=numbers.replace("+", r"\+")):
        CodeParams(k, m)


def test_a_code_is_a_frozen_record() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CodeParams(4, 2).data_count = 5  # type: ignore[misc]  # the point of the test
