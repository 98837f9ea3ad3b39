"""The random generators that a training process shares: their states as plain objects, and back.

Covers torch's CPU generator, the current CUDA device's (if CUDA runs already), Python's ``random``
and numpy's global generator (if numpy's is in use). A generator object of the caller's own belongs
into the caller's ``state_dict``.
"""

import random
import sys
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from holdfast.client.state_errors import MalformedShardError, StateError


def capture_rng() -> dict[str, object]:
    """Copy the generators' states; every value is what ``torch.load(weights_only=True)`` reads."""
    states: dict[str, object] = {"torch": torch.get_rng_state(), "python": _python_state()}
    # torch leaves these two without types
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state()
    if "numpy.random" in sys.modules:  # numpy loads it on first use
        state = np.random.get_state()
        if not isinstance(state, tuple):
            raise StateError("numpy's global generator is not MT19937: put its state into a state_dict of your own")
        kind, keys, position, has_gauss, gauss = state
        # Bytes instead of an array, and plain numbers instead of numpy's: weights_only admits no
        # numpy type.
        states["numpy"] = (
            kind,
            keys.astype("<u4").tobytes(),
            int(position),
            int(has_gauss),
            float(gauss),
        )
    return states


def restore_rng(states: Mapping[str, object]) -> None:
    """Put captured states back; afterwards each generator gives what it would have given next.

    Raises:
        MalformedShardError: a state is not one that ``capture_rng`` makes. Some generators may then
        be set already.
    """
    try:
        _restore(states)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise MalformedShardError(f"the shard's random generator states cannot be set: {error}") from error


def seeded_rng(seed: int) -> dict[str, object]:
    """States as `capture_rng` makes them, of generators freshly seeded; no generator in use is touched.

    Args:
        seed: 32 bits.
    """
    generator = torch.Generator().manual_seed(seed)
    version, words, gauss = random.Random(seed).getstate()  # noqa: S311  # a training's, nobody's secret
    states: dict[str, object] = {
        "torch": generator.get_state(),
        "python": (version, np.array(words, dtype="<u4").tobytes(), gauss),
    }
    if "numpy.random" in sys.modules:
        state = np.random.RandomState(seed).get_state()
        assert isinstance(state, tuple)
        states["numpy"] = (state[0], state[1].astype("<u4").tobytes(), int(state[2]), int(state[3]), float(state[4]))
    if torch.cuda.is_available():
        states["cuda"] = torch.Generator(device="cuda").manual_seed(seed).get_state()
    return states


def _restore(states: Mapping[str, object]) -> None:
    version, words, gauss = _three(states["python"])
    random.setstate((version, tuple(np.frombuffer(words, dtype="<u4").tolist()), gauss))
    if "numpy" in states:
        np.random.set_state(_numpy_state(states["numpy"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(states["cuda"]))
    torch.set_rng_state(_tensor(states["torch"]))


def _tensor(value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"expected a generator state as a tensor, found {type(value).__name__}")
    return value


def _python_state() -> tuple[int, bytes, float | None]:
    """Python's generator state with its 625 words as bytes: ten times cheaper to write and read."""
    version, words, gauss = random.getstate()
    return version, np.array(words, dtype="<u4").tobytes(), gauss


def _three(value: object) -> tuple[int, bytes, float | None]:
    if not isinstance(value, tuple) or len(value) != 3 or not isinstance(value[1], bytes):
        raise TypeError("expected Python's generator state as (version, bytes, number)")
    return value


def _numpy_state(value: object) -> tuple[str, npt.NDArray[np.uint32], int, int, float]:
    if not isinstance(value, tuple) or len(value) != 5 or not isinstance(value[1], bytes):
        raise TypeError("expected numpy's generator state as (kind, bytes, position, flag, number)")
    kind, keys, position, has_gauss, gauss = value
    return (kind, np.frombuffer(keys, dtype="<u4"), position, has_gauss, gauss)
