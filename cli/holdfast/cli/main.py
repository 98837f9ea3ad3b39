"""The command `holdfast`: picks the verb, runs it, and turns what goes wrong into an exit code.

Each verb is a module with `add_parser(subparsers)` and `run(args) -> int`. Only the module of the verb that was asked
for is imported, so that a quick verb never waits for what a slow one needs.
"""

import argparse
import os
import select
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from holdfast.protocol.exit_codes import ExitCode, OperatorError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
READER_GONE = 141  # 128 + SIGPIPE; not 0, which for `check` would mean that all is well

# name -> (module, what it does). In the order of the help.
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("holdfast.cli.demo", "train on a local cluster, kill nodes, recover, check that it is bit-exact"),
    "local": ("holdfast.cli.local", "a cluster of daemons on this machine, until interrupted"),
    "daemon": ("holdfast.cli.daemon", "run one node: keeper and worker"),
    "status": ("holdfast.cli.status", "how safe the cluster's jobs are, and the state of each node"),
    "check": ("holdfast.cli.check", "for monitors: exit 0 ok, 1 warning, 2 critical, 3 unknown"),
    "recover": ("holdfast.cli.recover", "rebuild what a replaced node lost, with progress"),
    "upgrade": ("holdfast.cli.upgrade", "replace this node's worker (new code, config, keys); every snapshot stays"),
    "trace": ("holdfast.cli.trace", "a Chrome trace of the last snapshots and recoveries, on all nodes"),
    "drill": ("holdfast.cli.drill", "prove on live data that what is committed can be rebuilt"),
    "forget": ("holdfast.cli.forget", "free all memory that a finished job holds, on every node"),
    "export": ("holdfast.cli.export", "write a committed step as a torch checkpoint, readable without Holdfast"),
    "plan": ("holdfast.cli.plan", "what a cluster would survive, and what it would cost"),
    "config": ("holdfast.cli.config", "check a config file, or show each value and where it came from"),
    "keys": ("holdfast.cli.keys", "make or list the nodes' keys"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of this process if None.

    Returns:
        The exit status: one of `ExitCode`, `INTERRUPTED` or `READER_GONE`. Arguments that argparse refuses, `--help`
        and `--version` end here too, with argparse's status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()  # here, so that a closed pipe shows now and not at exit
    except KeyboardInterrupt:
        return INTERRUPTED
    except OperatorError as error:
        sys.stderr.write(f"holdfast: {error}\n")
        return int(error.exit_code)
    except Exception as error:  # noqa: BLE001  # the edge of the program: whatever is left is our fault, and is said so
        if isinstance(error, BrokenPipeError) and _reader_gone():
            return READER_GONE
        sys.stderr.write(f"holdfast: this is a bug in Holdfast, please report it: {error!r}\n")
        traceback.print_exc()
        return int(ExitCode.BUG)
    return status


def _reader_gone() -> bool:
    """Whether it is our output that nobody reads any more (`holdfast status | head`), and not some other pipe.

    If so, stdout is led to where the interpreter's own last flush does no harm.
    """
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # stdout is no file, as under a test's capture
        return False
    poller = select.poll()
    poller.register(descriptor, 0)  # asks for nothing: an error is always reported
    if not any(events & select.POLLERR for _, events in poller.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    return True


def _run(arguments: list[str]) -> int:
    parser = _parser(arguments)
    try:
        args = parser.parse_args(arguments)
    except SystemExit as ending:  # argparse has said what there is to say
        return ending.code if isinstance(ending.code, int) else int(ExitCode.USAGE)
    if args.verb is None:
        parser.print_help(sys.stderr)
        return int(ExitCode.USAGE)
    module, _ = VERBS[args.verb]
    return int(import_module(module).run(args))


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="holdfast",
        description="Keeps the state of a distributed PyTorch training run alive in the memory of its nodes.",
        epilog="Exit codes: 0 done, 1 a bug, 2 usage or config, 3 not recoverable, 4 daemon unreachable, "
        "5 wrong cluster, epoch or key, 6 bytes fail their digest, 7 over the memory budget.",
    )
    parser.add_argument(
        "--version", action="version", version=f"holdfast {_version()}" if _asks_version(arguments) else ""
    )
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB")
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (module, summary) in VERBS.items():
        if name == chosen:
            import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def _asks_version(arguments: Sequence[str]) -> bool:
    return bool(arguments) and arguments[0].startswith("--v")


def _version() -> str:
    metadata = import_module("importlib.metadata")  # costs 20 ms, which only this answer needs
    return str(metadata.version("holdfast"))


if __name__ == "__main__":
    sys.exit(main())
