"""The keys of a trainer that comes in over the network, read from the folder that $HOLDFAST_KEYS_DIR names.

The folder is a copy of the cluster's: every node's public key beside each other, and under ``trainers`` the one secret
key of this trainer. No node's secret belongs there.
"""

import os
from pathlib import Path

from holdfast.client.errors import RefusedError
from holdfast.client.link import WireKeys
from holdfast.protocol.exit_codes import ExitCode
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

VARIABLE = "HOLDFAST_KEYS_DIR"


def wire_keys(node: str | None, host: str) -> list[WireKeys | None]:
    """Our own pair with each key that the node may have: two while its key is being replaced. None: no keys are used.

    Args:
        node: its name, None if the address does not say.
        host: the host of the address, which may be the node's name.

    Raises:
        RefusedError: a key is missing, open to others or malformed (exit code 5).
    """
    given = os.environ.get(VARIABLE, "")
    if not given:
        return [None]
    folder = Path(given)
    own = _own(folder / TRAINERS_FOLDER)
    name = _node(folder, node, host)
    files = [folder / f"{name}{PUBLIC_SUFFIX}", folder / f"{name}{RETIRED_SUFFIX}"]
    servers = [_read(file).public for file in files if file == files[0] or file.exists()]
    assert own.secret is not None
    return [WireKeys(own.public.encode(), own.secret.encode(), server.encode()) for server in servers]


def _own(folder: Path) -> KeyFile:
    found = sorted(folder.glob(f"*{SECRET_SUFFIX}"))
    if len(found) != 1:
        what = ", ".join(file.name for file in found[:4]) or "none"
        raise _refused(
            f"expected one secret key of this trainer in {folder}, found {what}. Make one with 'holdfast keys trainer "
            "--dir D NAME' where the cluster's keys were made, and copy it here"
        )
    mode = found[0].stat().st_mode
    if mode & SECRET_MODE_REFUSED:
        raise _refused(
            f"expected the secret key {found[0]} to be closed to other users, found mode {mode & 0o777:04o}. Close it "
            f"with 'chmod 600 {found[0]}'"
        )
    own = _read(found[0])
    if own.secret is None:
        raise _refused(f"{found[0]} holds no secret key. Copy the file again from where the keys were made")
    return own


def _node(folder: Path, node: str | None, host: str) -> str:
    names = [file.name.removesuffix(PUBLIC_SUFFIX) for file in sorted(folder.glob(f"*{PUBLIC_SUFFIX}"))]
    name = node if node is not None else host if host in names else names[0] if len(names) == 1 else None
    if name in names:
        return name
    some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    if name is None:
        raise _refused(
            f"which node is on {host}? {folder} has keys of {some or 'none'}. Say it in the address: tcp://NODE@HOST:PORT"
        )
    raise _refused(f"no public key of node {name} in {folder}, found {some or 'none'}. Copy all *{PUBLIC_SUFFIX} files")


def _read(file: Path) -> KeyFile:
    try:
        with file.open("rb") as stream:
            return read_key(stream.read(KEY_FILE_BYTES_MAX).decode("utf-8", errors="replace"))
    except OSError as error:
        raise _refused(f"{file} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise _refused(f"{file} {error}") from None


def _refused(text: str) -> RefusedError:
    return RefusedError(f"{VARIABLE}: {text}", exit_code=ExitCode.WRONG_CLUSTER)
