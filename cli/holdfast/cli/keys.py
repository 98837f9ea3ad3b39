"""`holdfast keys`: one CURVE key pair per node, in files that zmq.auth reads; made, listed, replaced.

A node needs its own secret file and everybody's public files. Covers making, listing and replacing them; the daemon
reads and judges them. A replaced key stays listed as retired, so that nodes can change over one by one. Trainers that
come in over the network have keys of their own, in a folder beside them.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from holdfast.cli.arguments import Subparsers, add_json_flag
from holdfast.cli.config import read_config
from holdfast.cli.output import emit, emit_json, table
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.settings import read_name
from holdfast.protocol.trust import PUBLIC_SUFFIX, RETIRED_SUFFIX, SECRET_SUFFIX, TRAINERS_FOLDER, read_key

_PUBLIC_NOTE = "# Holdfast: public key of node {name}. Every node of the cluster needs this file.\n"
_SECRET_NOTE = "# Holdfast: SECRET key of node {name}. Only that node may have this file.\n"  # noqa: S105  # words
_TRAINER_NOTES = (
    "# Holdfast: public key of trainer {name}. Every node that it may use needs this file.\n",
    "# Holdfast: SECRET key of trainer {name}. Only its processes may have this file.\n",
)


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb and its two parts."""
    parser = subparsers.add_parser("keys", help="make, list or replace the nodes' keys")
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    init = parts.add_parser("init", help="make a key pair for each node; refuses to overwrite one")
    init.add_argument("--dir", type=Path, required=True, metavar="D", help="folder for the key files, made if missing")
    init.add_argument("--config", type=Path, metavar="FILE", help="take the nodes' names from a config")
    init.add_argument("nodes", nargs="*", metavar="NODE", help="names of nodes")
    show = parts.add_parser("show", help="list the public keys in a folder")
    show.add_argument("--dir", type=Path, required=True, metavar="D", help="folder with key files")
    add_json_flag(show)
    trainer = parts.add_parser(
        "trainer", help="make a key pair for trainers that come in over the network (trainers.address)"
    )
    trainer.add_argument("--dir", type=Path, required=True, metavar="D", help="the folder with the nodes' key files")
    trainer.add_argument("names", nargs="*", metavar="NAME", help="names of the pairs; default: trainer")
    rotate = parts.add_parser("rotate", help="replace nodes' keys; the old ones stay listed until --finish")
    rotate.add_argument("--dir", type=Path, required=True, metavar="D", help="the folder with everybody's key files")
    rotate.add_argument(
        "--finish", action="store_true", help="every node has its new key: retired ones no longer count"
    )
    rotate.add_argument("nodes", nargs="*", metavar="NODE", help="names of nodes")


def run(args: argparse.Namespace) -> int:
    """Run `keys init`, `keys show`, `keys trainer` or `keys rotate`."""
    if args.part == "init":
        names = _names(args)
        write_keys(args.dir, names)
        emit(_next_steps(args.dir, names))
    elif args.part == "trainer":
        emit(_trainer(args.dir, args.names or ["trainer"]))
    elif args.part == "rotate":
        emit(_rotate(args))
    elif args.json:
        emit_json(
            "holdfast.keys/1",
            {
                "dir": str(args.dir),
                "keys": read_public_keys(args.dir),
                "retired": sorted(_retired(args.dir)),
                "trainers": _trainers(args.dir),
            },
        )
    else:
        emit(_listing(args.dir))
    return int(ExitCode.DONE)


def write_trainer_keys(directory: Path, names: Sequence[str]) -> None:
    """Make pairs for trainers in the folder `trainers` beside the nodes' keys. Otherwise like `write_keys`."""
    if not read_public_keys(directory):
        raise OperatorError(
            ExitCode.USAGE,
            f"expected the folder with the nodes' keys, found none of theirs in {directory}; make them first with "
            f"'holdfast keys init --dir {directory} NODE...'",
        )
    write_keys(directory / TRAINERS_FOLDER, names, notes=_TRAINER_NOTES)


def write_keys(directory: Path, names: Sequence[str], *, notes: tuple[str, str] = (_PUBLIC_NOTE, _SECRET_NOTE)) -> None:
    """Make one CURVE key pair per node: `<name>.key` (public) and `<name>.key_secret`.

    All or nothing: if one of the files is there already, none is written. The folder is made if it is missing, and
    closed to others (mode 0700); secret files have mode 0600 from the first byte on.

    `notes` stand at the top of each public and each secret file.

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
        _write_pairs(directory, [(name, *new_keypair()) for name in names], notes)
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
            keys[path.name.removesuffix(PUBLIC_SUFFIX)] = _public(path)
    except OSError as error:
        raise OperatorError(ExitCode.USAGE, f"can't read {directory}: {error}; check its permissions") from error
    return keys


def rotate_keys(directory: Path, names: Sequence[str]) -> None:
    """Give nodes a new pair each; the old public key becomes `<name>.key_retired`.

    The order of writing leaves a usable folder after each step: a retired key is listed before it is replaced. A secret
    that is not in this folder is replaced all the same: nobody needs the old one.

    Raises:
        OperatorError: a node without a key, or one whose last rotation is not finished (exit code 2); nothing is
            written then.
    """
    from holdfast.cli.link import new_keypair  # noqa: PLC0415  # as in `write_keys`

    known, retired = read_public_keys(directory), _retired(directory)
    _refuse_bad_names(names)
    for name in names:
        if name not in known:
            raise OperatorError(
                ExitCode.USAGE,
                f"no key of {name!r} in {directory}, found {', '.join(known) or 'none'}; correct the name",
            )
        if name in retired:
            raise OperatorError(
                ExitCode.USAGE,
                f"the last rotation of {name} is not finished: {directory / name}{RETIRED_SUFFIX} is still there. Once "
                f"every node runs with the new keys, give 'holdfast keys rotate --finish --dir {directory}'",
            )
    try:
        for name in names:
            public, secret = new_keypair()
            lines = f'curve\n    public-key = "{public}"\n'
            old = _PUBLIC_NOTE.format(name=name) + f'curve\n    public-key = "{known[name]}"\n'
            _replace(directory / (name + RETIRED_SUFFIX), old, mode=0o644)
            secret_text = _SECRET_NOTE.format(name=name) + lines + f'    secret-key = "{secret}"\n'
            _replace(directory / (name + SECRET_SUFFIX), secret_text, mode=0o600)
            _replace(directory / (name + PUBLIC_SUFFIX), _PUBLIC_NOTE.format(name=name) + lines, mode=0o644)
    except OSError as error:
        raise OperatorError(
            ExitCode.USAGE, f"can't write keys to {directory}: {error}; give --dir a folder that you may write"
        ) from error


def _rotate(args: argparse.Namespace) -> str:
    retired = _retired(args.dir)
    if args.finish:
        for name in sorted(retired):
            (args.dir / (name + RETIRED_SUFFIX)).unlink()
        done = f"No longer listed: {', '.join(sorted(retired))}." if retired else f"Nothing is retired in {args.dir}."
        return f"{done}\nRemove *{RETIRED_SUFFIX} on every node too, then give 'holdfast upgrade' there."
    if not args.nodes:
        raise OperatorError(ExitCode.USAGE, "expected names of nodes; give 'holdfast keys rotate --dir D NODE...'")
    rotate_keys(args.dir, args.nodes)
    return (
        f"New keys for {', '.join(args.nodes)} in {args.dir}; the old ones are still accepted.\n"
        f"1. Copy all *{PUBLIC_SUFFIX} and *{RETIRED_SUFFIX} files to every node, and to each named node its new "
        f"*{SECRET_SUFFIX}.\n"
        "2. On each named node: 'holdfast upgrade'. Snapshots stay where they are; the others read the lists by "
        "themselves.\n"
        f"3. When 'holdfast status' shows all nodes up: 'holdfast keys rotate --finish --dir {args.dir}'."
    )


def _trainer(directory: Path, names: Sequence[str]) -> str:
    write_trainer_keys(directory, names)
    return (
        f"Made {', '.join(names)} in {directory / TRAINERS_FOLDER}.\n"
        f"1. Copy {TRAINERS_FOLDER}/*{PUBLIC_SUFFIX} to the same folder of keys_dir on every node; no restart is "
        "needed.\n"
        f"2. Give trainers a folder with the nodes' *{PUBLIC_SUFFIX} files and, in {TRAINERS_FOLDER}/, one secret key "
        "of a trainer; name it in HOLDFAST_KEYS_DIR.\n"
        "3. HOLDFAST_SOCKET=tcp://NODE@HOST:PORT, the trainers.address of that node.\n"
        "To replace a key, make one of another name, change the trainers over, and remove the old public file on the "
        "nodes."
    )


def _retired(directory: Path) -> set[str]:
    return {path.name.removesuffix(RETIRED_SUFFIX) for path in directory.glob("*" + RETIRED_SUFFIX)}


def _public(path: Path) -> str:
    try:
        return read_key(path.read_text(encoding="utf-8", errors="replace")).public
    except ValueError as error:
        raise OperatorError(ExitCode.USAGE, f"{path} {error}") from error


def _replace(path: Path, text: str, *, mode: int) -> None:
    """Put a whole file in the place of another one: a reader finds the old or the new, never half of one."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


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


def _write_pairs(directory: Path, pairs: Sequence[tuple[str, str, str]], notes: tuple[str, str]) -> None:
    """Write (name, public, secret) as two files each; what was written is taken back if one fails."""
    written: list[Path] = []
    try:
        for name, public, secret in pairs:
            lines = f'curve\n    public-key = "{public}"\n'
            for suffix, mode, text in (
                (PUBLIC_SUFFIX, 0o644, notes[0].format(name=name) + lines),
                (SECRET_SUFFIX, 0o600, notes[1].format(name=name) + lines + f'    secret-key = "{secret}"\n'),
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
    shown = table(["node", "public key", "secret here"], rows, indent="")
    trainers = [[name, key] for name, key in _trainers(directory).items()]
    return shown + ("\n\n" + table(["trainer", "public key"], trainers, indent="") if trainers else "")


def _trainers(directory: Path) -> dict[str, str]:
    folder = directory / TRAINERS_FOLDER
    return read_public_keys(folder) if folder.is_dir() else {}
