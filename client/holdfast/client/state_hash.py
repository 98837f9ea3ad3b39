"""One SHA-256 over everything in a rank's state, to tell whether two states are the same bits."""

import hashlib
from collections.abc import Iterable, Mapping

from holdfast.client.flatten import Rules, dtype_name, flatten, state_of
from holdfast.client.manifest import show_path
from holdfast.client.sharding import describe, local_of
from holdfast.client.tensor_bytes import content


def hash_state(state: Mapping[str, object]) -> str:
    """SHA-256 over every tensor's path, dtype, shape and bytes and every plain object, in hex.

    Of a DTensor this rank's part counts, with its place in the whole. The order of dict keys does
    not matter, nor whether a sequence is a list or a tuple: a state that was put back hashes like
    the one it was taken from. Random generators are no part of ``state`` and do not count.

    Raises:
        StateError: something in the state is neither a tensor nor plain.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        flat = flatten(name, state_of(name, state[name]), Rules(allow_pickle=True))
        for leaf in sorted(flat.leaves, key=lambda leaf: show_path(leaf.path)):
            local = local_of(leaf.tensor)
            sharding = describe(leaf.tensor, [])
            offset = None if sharding is None else (sharding.global_shape, sharding.global_offset)
            place = f"{show_path(leaf.path)} {dtype_name(local.dtype)} {tuple(local.shape)} {offset}"
            digest.update(f"{len(place)} {place}".encode())
            digest.update(content(local).data)
        digest.update("".join(_canonical(flat.objects)).encode())
    return digest.hexdigest()


def _canonical(value: object) -> Iterable[str]:
    """A text that is the same for equal values, whatever the order their containers were filled."""
    if isinstance(value, Mapping):
        yield "{"
        for key in sorted(value, key=lambda key: (type(key).__name__, repr(key))):
            yield f"{key!r}:"
            yield from _canonical(value[key])
        yield "}"
    elif isinstance(value, list | tuple):
        yield "["
        for item in value:
            yield from _canonical(item)
        yield "]"
    elif isinstance(value, set | frozenset):
        yield from sorted("".join(_canonical(item)) for item in value)
    elif isinstance(value, float):
        yield f"{value.hex()},"
    else:
        yield f"{value!r},"
