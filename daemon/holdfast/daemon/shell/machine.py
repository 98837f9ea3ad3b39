"""What the machine has: total and free memory, from /proc/meminfo."""

import os
import time

_MEMINFO = "/proc/meminfo"
_MEMINFO_BYTES_MAX = 16 << 10  # a few KiB in fact
_FRESH_S = 0.5  # reading costs tens of microseconds; nobody needs it more often


class MachineMemory:
    """Reads /proc/meminfo, at most every half second."""

    def __init__(self) -> None:
        self._read_s = 0.0
        self._file = os.open(_MEMINFO, os.O_RDONLY | os.O_CLOEXEC)  # kept: it is read also when no descriptor is free
        self._values: dict[str, int] = {}
        self.total_bytes = self._get("MemTotal")

    def free_bytes(self) -> int:
        """What the kernel says could be had without swapping (MemAvailable)."""
        return self._get("MemAvailable")

    def _get(self, name: str) -> int:
        now_s = time.monotonic()
        if now_s - self._read_s > _FRESH_S or not self._values:
            self._read_s = now_s
            self._values = {}
            for line in os.pread(self._file, _MEMINFO_BYTES_MAX, 0).decode("ascii").splitlines():
                key, _, rest = line.partition(":")
                fields = rest.split()
                if fields and fields[0].isdigit():
                    self._values[key] = int(fields[0]) * 1024
        return self._values[name]
