"""The keeper's words to systemd: readiness, life signs, and the descriptor store as a second keeper.

Covers the notification socket (sd_notify) and the descriptors that a manager hands to a new main process
(sd_listen_fds), in the standard library alone. Without a manager every call does nothing. Sources: sd_notify(3),
sd_listen_fds(3).
"""

import fcntl
import os
import socket
import sys
import time
from collections.abc import MutableMapping

FIRST_GIVEN_FD = 3  # SD_LISTEN_FDS_START
GIVEN_COUNT_MAX = 4096  # descriptors taken over; systemd's own FileDescriptorStoreMax is far below
LISTEN_FDS_MAX = (1 << 31) - 1  # an int of C
WATCHDOG_USEC_MAX = (1 << 63) - 1  # whatever the unit says
NAME_CHARS_MAX = 255  # of a stored descriptor; no colon, no control character


def number_in(text: str, most: int) -> int | None:
    """A number from 0 to `most` in decimal digits; None: it is something else."""
    return int(text) if text.isdecimal() and len(text) <= len(str(most)) and int(text) <= most else None


class ServiceManager:
    """What started us, if it listens.

    Takes its variables out of the environment, so that no child of ours speaks in our name.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._address = environment.pop("NOTIFY_SOCKET", "")
        self._given = {name: environment.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")}
        watched = environment.pop("WATCHDOG_PID", "") or str(os.getpid())
        usec = number_in(environment.pop("WATCHDOG_USEC", ""), WATCHDOG_USEC_MAX)
        self.watchdog_s = usec / 1e6 if usec is not None and watched == str(os.getpid()) else None

    def tell(self, *lines: str, descriptor: int | None = None) -> None:
        """Send one notification; a manager that is away or slow is not waited for."""
        if not self._address:
            return
        # A leading @ names an abstract socket.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one:
                one.settimeout(1.0)
                one.connect(address)
                text = "\n".join(lines).encode()
                if descriptor is None:
                    one.send(text)
                else:
                    socket.send_fds(one, [text], [descriptor])
        except OSError as error:
            sys.stderr.write(f"keeper: the service manager does not hear {lines[0]}: {error}\n")

    def store(self, name: str, descriptor: int) -> None:
        """Have a descriptor held over our own death."""
        self.tell("FDSTORE=1", "FDPOLL=0", f"FDNAME={name}", descriptor=descriptor)

    def unstore(self, name: str) -> None:
        """No longer hold what was stored under a name."""
        self.tell("FDSTOREREMOVE=1", f"FDNAME={name}")

    def reloading(self) -> None:
        """A reload begins; READY=1 ends it."""
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def given(self) -> dict[str, int]:
        """Name -> descriptor of what a predecessor had stored; once. Those without a name of ours are closed."""
        given, self._given = self._given, {}
        count = number_in(given.get("LISTEN_FDS", ""), LISTEN_FDS_MAX)
        if count is None or given["LISTEN_PID"] != str(os.getpid()):
            return {}
        names = given["LISTEN_FDNAMES"].split(":")
        found: dict[str, int] = {}
        for index in range(min(count, GIVEN_COUNT_MAX)):
            descriptor = FIRST_GIVEN_FD + index
            name = names[index] if index < len(names) else ""
            if name in {"", "unknown", "stored"} or name in found:
                os.close(descriptor)
                continue
            fcntl.fcntl(descriptor, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
            found[name] = descriptor
        return found
