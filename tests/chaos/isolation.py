"""A program in namespaces of its own (processes, network, mounts), which all end with it, however it ends.

Covers entering them, as root or as anybody where the kernel allows user namespaces, and the two small processes around
the program: `run` outside waits and passes its end on; `main` inside is the namespace's first process. When either is
killed, the kernel kills every process inside, and with the last of them go all links, namespaces and files in /run.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

from holdfast.cli import processes

TOOLS = ("ip", "tc", "unshare", "setpriv", "nsenter", "mount")
_TRIAL_S = 20.0
FOLDER = Path("/run/chaos")  # inside: for files that go with the run


def obstacle() -> str:
    """Why namespaces can't be had here; empty if they can. Tries."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    trial = "ip netns add t && ip link add name v type veth peer name w netns t && ip link add name b type bridge"
    try:
        done = subprocess.run(
            _entered("sh", "-c", f"{trial} && nsenter --net=/run/netns/t true"),
            capture_output=True, text=True, timeout=_TRIAL_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else f"not allowed: {done.stderr.strip().splitlines()[-1:]}"


def run(command: list[str]) -> int:
    """Run a command inside; returns its exit status. SIGTERM, SIGHUP and Ctrl-C end all of it."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    with subprocess.Popen(_entered(*command)) as inside:
        try:
            return inside.wait()
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        finally:
            inside.kill()  # and with it the first process inside, and with that all others


def guard(*folders: Path) -> "subprocess.Popen[str]":
    """Without namespaces: a process that waits for our end, however it comes, then kills whoever names one of these
    folders on its command line, and removes them. Where that was done before, it finds nothing to do.
    """
    watch = f"import sys; told = sys.stdin.read(); sys.path[:] = {sys.path!r}; import isolation; isolation.clear(told)"
    waiting = subprocess.Popen([sys.executable, "-c", watch], stdin=subprocess.PIPE, text=True, start_new_session=True)
    assert waiting.stdin is not None
    waiting.stdin.write("\n".join(map(str, folders)))
    waiting.stdin.flush()  # and it stays open until we end
    return waiting


def clear(told: str) -> None:
    """Kill whoever names a folder, and remove the folders; one a line."""
    for folder in map(Path, told.splitlines()):
        processes.kill_all_using(folder)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """The first process inside: prepare, start the program, bury whoever lost its parent, until the program ends."""
    for words in (["mount", "-t", "tmpfs", "none", "/run"], ["ip", "link", "set", "lo", "up"]):
        subprocess.run(words, check=True)
    FOLDER.mkdir()
    tempfile.tempdir = str(FOLDER)
    program = subprocess.Popen(sys.argv[1:], env={**os.environ, "TMPDIR": str(FOLDER)})
    while True:
        pid, status = os.wait()
        if pid == program.pid:
            program.returncode = os.waitstatus_to_exitcode(status)
            return program.returncode if program.returncode >= 0 else 128 - program.returncode


def _entered(*command: str) -> list[str]:
    """`command` behind what enters the namespaces. setpriv: die with whoever started it."""
    space = ["--net", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
    if os.geteuid() != 0:
        space += ["--user", "--map-root-user"]
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *space, sys.executable, __file__, *command]


if __name__ == "__main__":
    sys.exit(main())
