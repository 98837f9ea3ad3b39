"""Holds a node's memory over the death of its worker: ``python -m holdfast.daemon.keeper -- WORKER-ARGUMENT...``.

Covers starting the worker, restarting it when it dies, and keeping the memory descriptors that it hands over. Knows
nothing of what is in the memory. Standard library only, no threads, no network: there is little here that could fail.

The worker speaks over a SOCK_SEQPACKET pair: ``hold NAME`` with one descriptor, ``drop NAME``, ``ready``, ``alive``
as long as its loop turns, ``grace SECONDS`` that a stop may take beyond the usual, ``ended CODE``. A new worker is
first told all that is held (``have NAME`` with its descriptor), then ``start``. A worker whose keeper was killed starts
a new one with ``--adopt PID --channel FD`` and hands everything over. Under systemd its descriptor store holds the same
descriptors, for a keeper that is restarted.

Signals: SIGTERM and SIGINT stop the worker and then the keeper; SIGHUP replaces the worker by one that reads config,
keys and code again. Whatever a worker that once ran ends with, the memory stays held and another one is tried.
"""

import argparse
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from holdfast.daemon.service_manager import ServiceManager, number_in

MESSAGE_BYTES_MAX = 512  # a verb and a name
HELD_COUNT_MAX = 4096  # descriptors; far below what a process may open by default
RESTART_PAUSE_S = 0.2  # between a worker's death and its successor, so that a worker that can't start doesn't spin
RETRY_PAUSE_S = 2.0  # the same, after one that ran was followed by one that refuses the config or the keys
SILENT_S = 60.0  # a worker whose loop has not turned for so long hangs, and is replaced; busy ones say so every second
LOOK_S = 1.0  # between two looks at the clock
STOP_WAIT_S = 30.0  # a worker asked to stop gets so long before it is killed
GRACE_S_MAX = 7 * 86400  # beyond that, which a worker may ask for; a config allows less
EXIT_CODE_MAX = 255
STOPPED_EXIT = 0  # on purpose
RESTART_EXIT = 75  # "another one of me, please": EX_TEMPFAIL of sysexits.h
REFUSING_EXITS = frozenset({2, 5})  # wrong usage or config; wrong cluster or key: at the first start nothing helps


def say(text: str) -> None:
    """Write a line to standard error, which is the log."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class Keeper:
    """The descriptors, and the life of the worker."""

    def __init__(self, worker_arguments: Sequence[str], manager: ServiceManager) -> None:
        self.worker_arguments = list(worker_arguments)
        self.manager = manager
        self.held = manager.given()
        self.worker_pid = 0
        self.stopping = False
        self.proven = False  # a worker has run with this config and these keys
        self.heard_s = 0.0  # when the worker's loop was last known to turn
        self.grace_s = 0  # that a worker asked to stop may take, beside STOP_WAIT_S
        self.ended: int | None = None  # the exit code that the worker announced: of an adopted one there is no other

    def on_signal(self, number: int, _frame: object) -> None:
        """Pass a signal on to the worker; its exit, after a request to stop, ends the keeper too."""
        if number == signal.SIGHUP:
            self.manager.reloading()
        else:
            self.stopping = True
            self.manager.tell("STOPPING=1")
        if self.worker_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.worker_pid, number)

    def start_worker(self) -> tuple[socket.socket, int]:
        """Start a worker and tell it what is held. Returns the channel and a pidfd."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "holdfast.daemon.shell.worker", *self.worker_arguments]
        # The worker is watched by a pidfd, which works for an adopted one as well, so no Popen object is kept.
        self.ended = None
        self.worker_pid = subprocess.Popen(
            [*command, "--keeper-fd", str(theirs.fileno())], pass_fds=[theirs.fileno()]
        ).pid
        theirs.close()
        if self.stopping:  # asked to while it was being made, when there was nobody yet to pass it on to
            os.kill(self.worker_pid, signal.SIGTERM)
        try:
            for name, descriptor in self.held.items():
                socket.send_fds(ours, [f"have {name}".encode()], [descriptor])
            ours.send(b"start")
        except OSError:
            pass  # it died at once; the pidfd says so
        return ours, os.pidfd_open(self.worker_pid)

    def watch(self, channel: socket.socket, pidfd: int) -> int | None:
        """Serve one worker until it ends. Returns its exit code, None if it died without one."""
        poller = select.poll()
        poller.register(channel, select.POLLIN)
        poller.register(pidfd, select.POLLIN)
        deadline_s = float("inf")
        self.heard_s = time.monotonic()
        look_s = min(LOOK_S, (self.manager.watchdog_s or LOOK_S) / 3)
        while True:
            now_s = time.monotonic()
            if self.stopping and deadline_s == float("inf"):
                deadline_s = now_s + STOP_WAIT_S + self.grace_s
            hangs = now_s > self.heard_s + SILENT_S
            if now_s > deadline_s or hangs:
                say(f"keeper: worker {self.worker_pid} {'has been silent' if hangs else 'does not stop'}; killing it")
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                self.heard_s = now_s
            if self.manager.watchdog_s is not None:
                self.manager.tell("WATCHDOG=1")
            ready = {descriptor for descriptor, _ in poller.poll(look_s * 1000)}
            if channel.fileno() in ready and not self.serve(channel):
                poller.unregister(channel)
            if pidfd in ready:
                break
        while self.serve(channel):  # what it still said before it died
            pass
        channel.close()
        os.close(pidfd)
        pid, self.worker_pid = self.worker_pid, 0  # from here on a signal has nobody to go to
        try:
            _, status = os.waitpid(pid, 0)
        except ChildProcessError:
            return self.ended
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else None

    def serve(self, channel: socket.socket) -> bool:
        """Handle one message. Returns False at the end of the conversation."""
        try:
            message, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES_MAX, 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return False
        verb, _, name = message.decode(errors="replace").partition(" ")
        self.heard_s = time.monotonic()
        if verb == "hold" and descriptors and len(self.held) < HELD_COUNT_MAX:
            self.let_go(name)
            self.held[name] = descriptors[0]
            self.manager.store(name, descriptors[0])
        elif verb == "drop":
            self.let_go(name)
        elif verb == "ready":
            self.proven = True
            self.manager.tell("READY=1", f"STATUS=worker {self.worker_pid}, {len(self.held)} pieces of memory held")
        elif verb == "grace" and (seconds := number_in(name, GRACE_S_MAX)) is not None:
            self.grace_s = seconds
        elif verb == "ended" and (code := number_in(name, EXIT_CODE_MAX)) is not None:
            self.ended = code
        else:
            for descriptor in descriptors:
                os.close(descriptor)
        return bool(message)

    def let_go(self, name: str) -> None:
        """Close what is held under a name, here and at the service manager's."""
        descriptor = self.held.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)
            self.manager.unstore(name)

    def run(self, adopted: tuple[socket.socket, int] | None) -> int:
        """Keep a worker running until it stops on purpose."""
        self.proven = adopted is not None
        while True:
            channel, pidfd = adopted or self.start_worker()
            adopted = None
            code = self.watch(channel, pidfd)
            refuses = code in REFUSING_EXITS
            if self.stopping or code == STOPPED_EXIT or (refuses and not (self.proven and self.installed())):
                return code if code not in {None, RESTART_EXIT} else 0
            if refuses:
                say(f"keeper: the new worker refuses to start ({code}, see above); {len(self.held)} pieces of memory "
                    f"stay held, trying again in {RETRY_PAUSE_S} s")  # fmt: skip
            elif code != RESTART_EXIT:
                say(f"keeper: the worker ended ({code}); starting another")
            self.pause(RETRY_PAUSE_S if refuses else 0.0 if code == RESTART_EXIT else RESTART_PAUSE_S)
            if self.stopping:
                return 0

    def installed(self) -> bool:
        """Whether the folder of the config is there: where it is gone, the node was taken down for good."""
        words = self.worker_arguments
        return "--config" not in words or Path(words[words.index("--config") + 1]).parent.is_dir()

    def pause(self, seconds: float) -> None:
        """Wait between two workers; a request to stop ends it, and the service manager hears that we live."""
        deadline_s = time.monotonic() + seconds
        while not self.stopping and (left_s := deadline_s - time.monotonic()) > 0:
            if self.manager.watchdog_s is not None:
                self.manager.tell("WATCHDOG=1")
            time.sleep(min(left_s, RESTART_PAUSE_S))


def main() -> int:
    """Entry point."""
    if not __debug__:
        say("holdfast refuses to run under python -O: its assertions guard stored state")
        return 2
    parser = argparse.ArgumentParser(prog="holdfast.daemon.keeper")
    parser.add_argument("--adopt", type=int, default=0)
    parser.add_argument("--channel", type=int, default=-1)
    parser.add_argument("worker", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    worker = [argument for argument in arguments.worker if argument != "--"]
    keeper = Keeper(worker, ServiceManager(os.environ))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, keeper.on_signal)
    adopted = None
    if arguments.adopt:
        keeper.worker_pid = arguments.adopt
        adopted = socket.socket(fileno=arguments.channel), os.pidfd_open(arguments.adopt)
    return keeper.run(adopted)


if __name__ == "__main__":
    sys.exit(main())
