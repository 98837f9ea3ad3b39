"""The CURVE keys of a node, read from the files of `security.keys_dir`.

Covers reading and judging: each way in which keys can be wrong has its own sentence and ends with exit code 5. The
handshakes that use them are the control plane's; making and replacing keys is the command line's.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.protocol import limits
from holdfast.protocol.config import ClusterConfig
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.trust import (
    KEY_FILE_BYTES_MAX,
    PUBLIC_SUFFIX,
    RETIRED_SUFFIX,
    SECRET_MODE_REFUSED,
    SECRET_SUFFIX,
    TRAINERS_FOLDER,
    KeyFile,
    read_key,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Keys:
    """CURVE keys, Z85: our own pair, and the public keys of every node.

    Attributes:
        public: our own public key.
        secret: our own secret key.
        nodes: public key -> node index, retired keys of a rotation under way included.
        listed: node index -> its keys, the current one first.
    """

    public: bytes
    secret: bytes
    nodes: dict[bytes, int]
    listed: dict[int, tuple[bytes, ...]] = field(default_factory=dict)

    def of(self, node: int, attempt: int = 0) -> bytes:
        """A public key of a node: the current one, at later attempts also the one that a rotation retired."""
        known = self.listed[node]
        return known[attempt % len(known)]

    def several(self, node: int) -> bool:
        """Whether a rotation of this node's key is under way."""
        return len(self.listed[node]) > 1


def load_keys(config: ClusterConfig, node: int, *, public_of: Callable[[bytes], bytes]) -> Keys | None:
    """Read the keys of the cluster, or None if none are configured.

    Args:
        config: names the folder and the nodes.
        node: whose secret key is ours.
        public_of: the public key that belongs to a secret one.

    Raises:
        OperatorError: a key is missing, open to others, malformed, not a pair, or not (any more) the listed one
            (exit code 5).
    """
    if config.keys_dir is None:
        return None
    folder, name = Path(config.keys_dir), config.nodes[node].name
    if not folder.is_dir():
        raise _refused(f"expected a folder, found none at {folder}. Copy it from where 'holdfast keys init' was run")
    own = _secret(folder / f"{name}{SECRET_SUFFIX}")
    assert own.secret is not None
    listed = _listed(config, folder)
    public, secret = own.public.encode(), own.secret.encode()
    if public_of(secret) != public:
        raise _refused(
            f"the secret and the public key in {folder / name}{SECRET_SUFFIX} are not one pair. Copy the file again"
        )
    if listed[node][0] != public:
        raise _refused(_why_not_listed(config, node, public, listed))
    return _keys(public, secret, listed)


def reread(keys: Keys, config: ClusterConfig) -> Keys:
    """The same pair with the list of public keys as the folder has it now; the old list if that one is not good."""
    assert config.keys_dir is not None
    try:
        return _keys(keys.public, keys.secret, _listed(config, Path(config.keys_dir)))
    except OperatorError as error:
        log.warning("the list of keys stays as it was: %s", error)
        return keys


def trainer_keys(folder: Path) -> dict[bytes, str]:
    """The public keys of trainers that may come in over the network -> the name of their file.

    A file that can't be read lets nobody in, and is said.
    """
    found: dict[bytes, str] = {}
    files = sorted((folder / TRAINERS_FOLDER).glob(f"*{PUBLIC_SUFFIX}"))
    if len(files) > limits.TRAINER_KEYS_COUNT_MAX:
        log.warning("%d keys of trainers: only the first %d count", len(files), limits.TRAINER_KEYS_COUNT_MAX)
    for file in files[: limits.TRAINER_KEYS_COUNT_MAX]:
        try:
            found[_key(file).public.encode()] = file.name.removesuffix(PUBLIC_SUFFIX)
        except OperatorError as error:
            log.warning("a trainer's key does not count: %s", error)
    return found


def _keys(public: bytes, secret: bytes, listed: dict[int, tuple[bytes, ...]]) -> Keys:
    return Keys(public, secret, {key: index for index, keys in listed.items() for key in keys}, listed)


def _secret(file: Path) -> KeyFile:
    """Our own secret key."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        raise _refused(
            f"the secret key {file} is missing. Copy this node's *{SECRET_SUFFIX} file from where the keys were made"
        ) from None
    except OSError as error:
        raise _refused(
            f"the secret key {file} can't be read: {error.strerror}. Let the daemon's user read it"
        ) from None
    if mode & SECRET_MODE_REFUSED:
        raise _refused(
            f"expected the secret key {file} to be closed to other users, found mode {mode & 0o777:04o}. "
            f"Close it with 'chmod 600 {file}'; if others may have read it, replace it with 'holdfast keys rotate'"
        )
    found = _key(file)
    if found.secret is None:
        raise _refused(f"{file} holds no secret key. Copy this node's file again from where the keys were made")
    return found


def _listed(config: ClusterConfig, folder: Path) -> dict[int, tuple[bytes, ...]]:
    """Every node's public keys; all that are missing are named together."""
    missing = [peer.name for peer in config.nodes if not (folder / f"{peer.name}{PUBLIC_SUFFIX}").exists()]
    if missing:
        some = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise _refused(
            f"no public key of {some} in {folder}. Copy all *{PUBLIC_SUFFIX} files from where the keys were made"
        )
    listed: dict[int, tuple[bytes, ...]] = {}
    for index, peer in enumerate(config.nodes):
        keys = [_key(folder / f"{peer.name}{PUBLIC_SUFFIX}").public.encode()]
        retired = folder / f"{peer.name}{RETIRED_SUFFIX}"
        if retired.exists():
            keys.append(_key(retired).public.encode())
        listed[index] = tuple(dict.fromkeys(keys))
    _refuse_shared(config, listed)
    return listed


def _refuse_shared(config: ClusterConfig, listed: dict[int, tuple[bytes, ...]]) -> None:
    first_use: dict[bytes, int] = {}
    for index, keys in listed.items():
        for key in keys:
            if first_use.setdefault(key, index) != index:
                names = f"{config.nodes[first_use[key]].name} and {config.nodes[index].name}"
                raise _refused(f"{names} have the same public key. Give each node its own: 'holdfast keys rotate'")


def _why_not_listed(config: ClusterConfig, node: int, public: bytes, listed: dict[int, tuple[bytes, ...]]) -> str:
    folder, name = Path(config.keys_dir or ""), config.nodes[node].name
    owner = next((config.nodes[index].name for index, keys in listed.items() if public in keys), None)
    if owner not in {None, name}:
        return (
            f"expected the secret key of {name} in {folder / name}{SECRET_SUFFIX}, found that of {owner}. "
            f"Copy {name}{SECRET_SUFFIX} again from where the keys were made, and let no other node have it"
        )
    if owner is not None:
        return (
            f"the secret key of {name} was replaced by 'holdfast keys rotate' and is only listed as retired. "
            f"Copy the new {name}{SECRET_SUFFIX} to {folder}"
        )
    return (
        f"the secret key of {name} is not, or not any more, the one that {folder / name}{PUBLIC_SUFFIX} lists. "
        f"Copy {name}{SECRET_SUFFIX} and all *{PUBLIC_SUFFIX} files again from where the keys were made"
    )


def _key(file: Path) -> KeyFile:
    try:
        with file.open("rb") as stream:
            text = stream.read(KEY_FILE_BYTES_MAX).decode("utf-8", errors="replace")
    except OSError as error:
        raise _refused(f"{file} can't be read: {error.strerror}. Let the daemon's user read it") from None
    try:
        return read_key(text)
    except ValueError as error:
        raise _refused(f"{file} {error}") from None


def _refused(text: str) -> OperatorError:
    return OperatorError(ExitCode.WRONG_CLUSTER, f"security.keys_dir: {text}")
