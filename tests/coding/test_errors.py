from holdfast.coding import (
    BufferMismatchError,
    CodingError,
    EngineUnavailableError,
    NotEnoughShardsError,
)


def test_every_error_of_the_room_can_be_caught_as_one_and_as_a_value_error() -> None:
    for kind in (BufferMismatchError, EngineUnavailableError, NotEnoughShardsError):
        assert issubclass(kind, CodingError)
    assert issubclass(CodingError, ValueError)
