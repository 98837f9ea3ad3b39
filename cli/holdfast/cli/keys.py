"""`holdfast keys init` and `keys show`: one CURVE key pair per node, in files that zmq.auth reads.

A node needs its own secret file and everybody's public files. Covers making and listing them; the daemon reads them.
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from holdfast.cli.arguments import Subparsers, add_json_flag
from holdfast.cli.config import read_config
from holdfast.cli.output import emit, emit_json, table
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.settings import read_name

PUBLIC_SUFFIX = ".key"
SECRET_SUFFIX = ".key_secret"  # noqa: S105  # the name of a file

_PUBLIC_LINE = re.compile(r'^\s*public-key\s*=\s*"([^"]{40})"\s*$', re.MULTILINE)
_PUBLIC_NOTE = "# Holdfast: public key of node {name}. Every node of the cluster needs this file.\n"
_SECRET_NOTE = "# Holdfast: SECRET key of node {name}. Only that node may have this file.\n"  # noqa: S105  # words


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb and its two parts."""
    parser = subparsers.add_parser("keys", help="make or list the nodes' keys")
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    init = parts.add_parser("init", help="make a key pair for each node; refuses to overwrite one")
    init.add_argument("--dir", type=Path, required=True, metavar="D", help="folder for the key files, made if missing")
    init.add_argument("--config", type=Path, metavar="FILE", help="take the nodes' names from a config")
    init.add_argument("nodes", nargs="*", metavar="NODE", help="names of nodes")
    show = parts.add_parser("show", help="list the public keys in a folder")
    show.add_argument("--dir", type=Path, required=True, metavar="D", help="folder with key files")
    add_json_flag(show)


def run(args: argparse.Namespace) -> int:
    """Run `keys init` or `keys show`."""
    if args.part == "init":
        names = _names(args)
        write_keys(args.dir, names)
        emit(_next_steps(args.dir, names))
    elif args.json:
        emit_json("holdfast.keys/1", {"dir": str(args.dir), "keys": read_public_keys(args.dir)})
    else:
        emit(_listing(args.dir))
    return int(ExitCode.DONE)


def write_keys(directory: Path, names: Sequence[str]) -> None:
    """Make one CURVE key pair per node: `<name>.key` (public) and `<name>.key_secret`.

    All or nothing: if one of the files is there already, none is written. The folder is made if it is missing, and
    closed to others (mode 0700); secret files have mode 0600 from the first byte on.

    Raises:
        OperatorError: a name that can't be a node's, one named twice, a key that is there already, or a folder that
            can't be written (exit code 2).
    """
    _refuse_bad_names(names)
    # ZeroMQ costs 30 ms, which `keys show` and the help do without.
    from holdfast.cli.link import new_keypair  # noqa: PLC0415

    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_to_overwrite(directory, names)
        directory.chmod(0o700)
        _write_pairs(directory, [(name, *new_keypair()) for name in names])
    except OSError as error:
        raise OperatorError(
            ExitCode.USAGE, f"can't write keys to {directory}: {error}; give --dir a folder that you may write"
        ) from error


def read_public_keys(directory: Path) -> dict[str, str]:
    """The public keys in a folder, by node's name.

    Raises:
        OperatorError: no such folder, or a file that is no certificate (exit code 2).
    """
    keys: dict[str, str] = {}
    try:
        if not directory.is_dir():
            raise OperatorError(
                ExitCode.USAGE,
                f"{directory} is no folder; make keys with 'holdfast keys init --dir {directory} NODE...'",
            )
        for path in sorted(directory.glob("*" + PUBLIC_SUFFIX)):
            found = _PUBLIC_LINE.search(path.read_text(encoding="utf-8", errors="replace"))
            if found is None:
                raise OperatorError(
                    ExitCode.USAGE,
                    f"{path} has no line 'public-key = \"...\"' of 40 characters; copy it again from where it was made",
                )
            keys[path.name.removesuffix(PUBLIC_SUFFIX)] = found[1]
    except OSError as error:
        raise OperatorError(ExitCode.USAGE, f"can't read {directory}: {error}; check its permissions") from error
    return keys


def _names(args: argparse.Namespace) -> list[str]:
    if bool(args.nodes) == (args.config is not None):
        raise OperatorError(
            ExitCode.USAGE, "expected either names of nodes or --config FILE; give 'holdfast keys init --dir D NODE...'"
        )
    return list(args.nodes) or [node.name for node in read_config(args.config).config.nodes]


def _refuse_bad_names(names: Sequence[str]) -> None:
    for name in names:
        try:
            read_name(name)
        except ValueError as error:
            raise OperatorError(
                ExitCode.USAGE, f"{name!r} can't name a node: expected {error}; use the names of the config"
            ) from error
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise OperatorError(ExitCode.USAGE, f"named twice: {', '.join(twice)}; name each node once")


def _refuse_to_overwrite(directory: Path, names: Sequence[str]) -> None:
    there = [
        name + suffix
        for name in names
        for suffix in (PUBLIC_SUFFIX, SECRET_SUFFIX)
        if os.path.lexists(directory / (name + suffix))
    ]
    if there:
        raise OperatorError(
            ExitCode.USAGE,
            f"{directory} already has {', '.join(there)}: nothing was written. Keys are never overwritten; "
            "choose another folder, or remove the old keys first (the nodes that use them are then locked out)",
        )


def _write_pairs(directory: Path, pairs: Sequence[tuple[str, str, str]]) -> None:
    """Write (name, public, secret) as two files each; what was written is taken back if one fails."""
    written: list[Path] = []
    try:
        for name, public, secret in pairs:
            lines = f'curve\n    public-key = "{public}"\n'
            for suffix, mode, text in (
                (PUBLIC_SUFFIX, 0o644, _PUBLIC_NOTE.format(name=name) + lines),
                (SECRET_SUFFIX, 0o600, _SECRET_NOTE.format(name=name) + lines + f'    secret-key = "{secret}"\n'),
            ):
                path = directory / (name + suffix)
                # O_EXCL: refuses what somebody else made meanwhile, and a symbolic link that points elsewhere.
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
                written.append(path)
                with os.fdopen(descriptor, "w", encoding="ascii") as stream:
                    stream.write(text)
                    stream.flush()
                    os.fsync(stream.fileno())
    except OSError:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _next_steps(directory: Path, names: Sequence[str]) -> str:
    count = len(names)
    return (
        f"Made {count} key pair{'s' if count != 1 else ''} in {directory}.\n"
        f"Copy to every node all *{PUBLIC_SUFFIX} files and its own NODE{SECRET_SUFFIX}, and nobody else's.\n"
        f'Then set keys_dir = "{directory}" under [security] in the config of all nodes.'
    )


def _listing(directory: Path) -> str:
    keys = read_public_keys(directory)
    if not keys:
        return f"No keys in {directory}. Make some with 'holdfast keys init --dir {directory} NODE...'."
    rows = [[name, key, "yes" if (directory / (name + SECRET_SUFFIX)).exists() else "no"] for name, key in keys.items()]
    return table(["node", "public key", "secret here"], rows, indent="")
