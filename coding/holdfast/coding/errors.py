"""What can go wrong in the algebra and with its arguments: each error carries the numbers.

All are the caller's fault or the world's, never a peer's: this room knows no peer.
"""


class CodingError(ValueError):
    """Base of every error of this room: an argument that no code can be computed with."""


class NotEnoughShardsError(CodingError):
    """Fewer chunks than the code needs, or positions that do not determine the wanted ones."""


class BufferMismatchError(CodingError):
    """Buffers that do not fit the coefficients, each other, or their role as source or target."""


class EngineUnavailableError(CodingError):
    """An engine was asked for by name that is unknown or cannot run on this machine."""
