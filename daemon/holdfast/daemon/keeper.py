"""Holds a node's memory over the death of its worker: ``python -m holdfast.daemon.keeper -- WORKER-ARGUMENT...``.

Covers starting the worker, restarting it when it dies, and keeping the memory descriptors that it hands over. Knows
nothing of what is in the memory. Standard library only, no threads, no network: there is little here that could fail.

The worker speaks over a SOCK_SEQPACKET pair: ``hold NAME`` with one descriptor, ``drop NAME``, and ``ended CODE`` when
it stops on purpose. A new worker is first told all that is held (``have NAME`` with its descriptor), then ``start``. A
worker whose keeper was killed starts a new one with ``--adopt PID --channel FD`` and hands everything over.
"""

import argparse
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

MESSAGE_BYTES_MAX = 512  # a verb and a name
HELD_COUNT_MAX = 4096  # descriptors; far below what a process may open by default
RESTART_PAUSE_S = 0.2  # between a worker's death and its successor, so that a worker that can't start doesn't spin
STOP_WAIT_S = 30.0  # a worker asked to stop gets so long before it is killed
FINAL_EXITS = frozenset(
    {0, 2, 5}
)  # stopped on purpose; wrong usage or config; wrong cluster or key: restarting won't help


def say(text: str) -> None:
    """Write a line to standard error, which is the log."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class Keeper:
    """The descriptors, and the life of the worker."""

    def __init__(self, worker_arguments: Sequence[str]) -> None:
        self.worker_arguments = list(worker_arguments)
        self.held: dict[str, int] = {}
        self.worker_pid = 0
        self.stopping = False
        self.ended: int | None = None  # the exit code that the worker announced: of an adopted one there is no other

    def on_signal(self, number: int, _frame: object) -> None:
        """Pass a stop on to the worker; its exit ends the keeper too."""
        self.stopping = self.stopping or number != signal.SIGHUP
        if self.worker_pid:
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
        while True:
            if self.stopping and deadline_s == float("inf"):
                deadline_s = time.monotonic() + STOP_WAIT_S
            if time.monotonic() > deadline_s:
                os.kill(self.worker_pid, signal.SIGKILL)
            ready = {descriptor for descriptor, _ in poller.poll(1000)}
            if channel.fileno() in ready and not self.serve(channel):
                poller.unregister(channel)
            if pidfd in ready:
                break
        while self.serve(channel):  # what it still said before it died
            pass
        channel.close()
        os.close(pidfd)
        try:
            _, status = os.waitpid(self.worker_pid, 0)
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
        if verb == "hold" and descriptors and len(self.held) < HELD_COUNT_MAX:
            previous = self.held.pop(name, None)
            self.held[name] = descriptors[0]
            if previous is not None:
                os.close(previous)
        elif verb == "drop" and name in self.held:
            os.close(self.held.pop(name))
        elif verb == "ended" and name.isdecimal():
            self.ended = int(name)
        else:
            for descriptor in descriptors:
                os.close(descriptor)
        return bool(message)

    def run(self, adopted: tuple[socket.socket, int] | None) -> int:
        """Keep a worker running until it stops on purpose."""
        while True:
            channel, pidfd = adopted or self.start_worker()
            adopted = None
            code = self.watch(channel, pidfd)
            if self.stopping or code in FINAL_EXITS:
                return code if code is not None else 0
            say(f"keeper: worker {self.worker_pid} ended ({code}); starting another")
            time.sleep(RESTART_PAUSE_S)


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
    keeper = Keeper([argument for argument in arguments.worker if argument != "--"])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, keeper.on_signal)
    adopted = None
    if arguments.adopt:
        keeper.worker_pid = arguments.adopt
        adopted = socket.socket(fileno=arguments.channel), os.pidfd_open(arguments.adopt)
    return keeper.run(adopted)


if __name__ == "__main__":
    sys.exit(main())
