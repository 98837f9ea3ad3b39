"""Who may come in: what a cluster without keys may not listen on, and what a key file says. Pure.

Covers judging a config and reading the text of key files. Reading the files, their permissions, and the handshakes
are the daemon's and the command line's.
"""

import re
from dataclasses import dataclass

from holdfast.protocol.config import ClusterConfig
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.settings import is_loopback

PUBLIC_SUFFIX = ".key"
SECRET_SUFFIX = ".key_secret"  # noqa: S105  # the name of a file
RETIRED_SUFFIX = ".key_retired"  # a public key that 'holdfast keys rotate' replaced; accepted until it is removed
TRAINERS_FOLDER = "trainers"  # of the keys folder: the keys of trainers that come in over the network
KEY_FILE_BYTES_MAX = 4096  # two lines and a comment
SECRET_MODE_REFUSED = 0o027  # others may not even read it, the group may not write it; group-readable is for mounts

_LINE = r'^\s*{}\s*=\s*"([^"\s]{{40}})"\s*$'
_PUBLIC_LINE = re.compile(_LINE.format("public-key"), re.MULTILINE)
_SECRET_LINE = re.compile(_LINE.format("secret-key"), re.MULTILINE)


@dataclass(frozen=True, slots=True)
class KeyFile:
    """What a key file holds: 40 characters of Z85 each. `secret` is None in a public file."""

    public: str
    secret: str | None


def read_key(text: str) -> KeyFile:
    """The keys in a file's text.

    Raises:
        ValueError: it has no public key; with words that follow the file's name.
    """
    public, secret = _PUBLIC_LINE.search(text), _SECRET_LINE.search(text)
    if public is None:
        raise ValueError("has no line 'public-key = \"...\"' of 40 characters; copy it again from where it was made")
    return KeyFile(public[1], None if secret is None else secret[1])


def exposed_nodes(config: ClusterConfig) -> list[str]:
    """Names of the nodes that would listen beyond this machine without any key."""
    if config.keys_dir is not None:
        return []
    return [node.name for node in config.nodes if not is_loopback(node.host)]


def refuse_exposure(config: ClusterConfig) -> None:
    """Refuse a cluster that would let strangers in.

    Raises:
        OperatorError: an address is reachable from elsewhere and there are no keys (exit code 5).
    """
    exposed = exposed_nodes(config)
    if exposed:
        first = next(node for node in config.nodes if node.name == exposed[0])
        more = f" and {len(exposed) - 1} more" if len(exposed) > 1 else ""
        raise OperatorError(
            ExitCode.WRONG_CLUSTER,
            f"security.keys_dir: expected keys, since node {first.name}{more} would listen on {first.address}, which "
            "others can reach; found none. Anybody who connects could read and replace training state. Make keys with "
            "'holdfast keys init --config FILE --dir DIR' and set keys_dir under [security], or use addresses of "
            "127.0.0.0/8 on a single machine",
        )
