"""Where a trainer's daemon is, and the way there: its Unix socket, or its gate for trainers over the network."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from holdfast.client.link import Link
from holdfast.protocol.cadence import Cadence
from holdfast.protocol.settings import split_address

Address = Path | str  # a Unix socket's path, or "tcp://host:port"

_NETWORK = re.compile(r"tcp:/+(?:(?P<node>[^@/,]+)@)?(?P<place>[^@/,]+)/?")


def daemon_address(given: str | os.PathLike[str] | None, *, local_rank: int) -> Address:
    """Where the daemon is: as given, $HOLDFAST_SOCKET, /run/holdfast, $XDG_RUNTIME_DIR/holdfast.

    A Unix socket's path; or "tcp://host:port", where that can't be reached: the daemon's trainers.address, with keys
    also "tcp://node@host:port". The value may list several, separated by commas: ranks of one host then use them in
    turn, by local rank. That is how one torchrun drives several nodes on one machine.

    Raises:
        ValueError: an address of the network that is none.
    """
    listed = os.fspath(given) if given is not None else os.environ.get("HOLDFAST_SOCKET", "")
    if listed:
        several = [one for one in listed.split(",") if one]
        found = several[local_rank % len(several)]
        if not found.startswith("tcp:"):
            return Path(found)
        split_network(found)
        return "tcp://" + found.removeprefix("tcp:").lstrip("/")  # a Path has but one slash
    system = Path("/run/holdfast/holdfast.sock")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if system.exists() or not runtime:
        return system
    return Path(runtime) / "holdfast" / "holdfast.sock"


def split_network(address: str) -> tuple[str | None, str, int]:
    """The node, if it is named, the host and the port of "tcp://node@host:port"."""
    found = _NETWORK.fullmatch(address)
    if found is None:
        raise ValueError(f'socket: expected a path or "tcp://host:port", found {address!r}')
    try:
        host, port = split_address(found["place"])
    except ValueError as error:
        raise ValueError(f'socket: expected {error}; write "tcp://host:port"') from error
    return found["node"], host, port


def connect(address: Address, *, wake_fd: int, cadences: Mapping[int, tuple[Cadence, ...]] | None = None) -> Link:
    """Meet the daemon. See `Link`.

    Raises:
        DaemonUnreachableError: nobody answers there.
        RefusedError: this trainer's key is not let in (exit code 5).
    """
    if isinstance(address, Path):
        return Link(address, wake_fd=wake_fd, cadences=cadences)
    from holdfast.client.remote import RemoteLink  # noqa: PLC0415  # who maps its memory has no use for it

    return RemoteLink(address, wake_fd=wake_fd, cadences=cadences)
