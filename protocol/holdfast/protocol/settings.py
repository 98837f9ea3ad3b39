"""The settings of a cluster's config: their names, defaults and how one value is read. Pure.

Covers one value at a time. Where values come from and which must go together is
`holdfast.protocol.config`'s.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from holdfast.protocol import limits
from holdfast.protocol.placement import GROUP_SIZE_MAX

ENVIRONMENT_PREFIX = "HOLDFAST_"
ENGINE_NAMES = ("auto", "native", "isal", "numpy", "naive")
BULK_MODES = ("digest", "sealed")
SLOTS_MIN = 2  # one holds the committed snapshot while the next one is staged
SLOTS_MAX = limits.SLOTS_COUNT_MAX
EPOCH_MAX = (1 << 31) - 1
CLOSED_JOB_S_MAX = 366 * 86400  # a year: longer than any job waits to be started again
PORT_MAX = 65535
PERIOD_S_MAX = 366 * 86400  # a year: longer than any memory rests unread
KEEP_MAX = 1000  # copies of one job in a directory
GRACE_S_MAX = 3600  # that a node asked to stop waits for the last copy
LIVES_MAX = 1000

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SIZE = re.compile(r"(\d{1,18})(?:\.(\d{1,9}))?\s*([A-Za-z]*)")
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_ADDRESS = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.%A-Za-z]+)\]|(?P<host>[^\s:\[\]]+)):(?P<port>[^:]*)")

_KEYS_OF_SEVERAL = {
    "name", "address", "period_s", "bandwidth", "cpu_percent", "dir", "every_s", "every_steps", "keep", "grace_s",
    "after_lives", "bulk",
}  # fmt: skip  # too vague without their section

Value = str | int | None


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of the config outside `[[node]]`.

    Attributes:
        section, key: where it stands in the file.
        field: the attribute of `ClusterConfig` that holds it.
        read: turns what the file, environment or a flag gives into the value.
        default: the value if nothing gives one.
        numeric: whether text from the environment or a flag is first made a whole number.
        required: whether the file must have it.

    `read` raises ValueError with the words that follow "expected".
    """

    section: str
    key: str
    field: str
    read: Callable[[object], Value]
    default: Value = None
    numeric: bool = False
    required: bool = False

    @property
    def name(self) -> str:
        """The dotted name, as problems and origins give it."""
        return f"{self.section}.{self.key}"

    @property
    def environment_name(self) -> str:
        """The environment variable that overrides the file."""
        return f"{ENVIRONMENT_PREFIX}{self.section}_{self.key}".upper()

    @property
    def flag(self) -> str:
        """The command line's flag that overrides both."""
        text = self.name.replace(".", "-") if self.key in _KEYS_OF_SEVERAL else self.key
        return "--" + text.replace("_", "-")


def describe(value: object) -> str:
    """A found value in an operator's words, at most a line."""
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return str(value)
        case str():
            return f"the text {_shortened(value)!r}"
        case dict():
            return "a table"
        case list():
            return "a list"
        case _:
            return _shortened(str(value))


def read_name(value: object) -> str:
    """A name that is safe in messages, file names and metrics."""
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise ValueError(
            f"1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit; found {describe(value)}"
        )
    return value


def read_text(value: object) -> str:
    """Any text on one line that is not blank."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError(f"a text on one line that is not blank, found {describe(value)}")
    return value


def read_size(value: object) -> int:
    """Bytes, from a whole number or a text such as "512MiB"."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"a size of 0 bytes or more, found {value}")
        return value
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f'a size such as "8GiB" or a number of bytes, found {describe(value)}')
    whole, fraction, unit = found[1], found[2] or "", found[3]
    factor = {name.lower(): factor for name, factor in _UNITS.items()}.get(unit.lower())
    if factor is None:
        raise ValueError(f"one of the units B, KiB, MiB, GiB, TiB; found {unit!r} in {value!r}{_unit_hint(unit)}")
    size: int = int(whole + fraction) * factor // 10 ** len(fraction)  # fraction digits >= 0
    return size


def read_address(value: object) -> str:
    """An address "host:port", IPv6 in brackets; returned as it is."""
    split_address(value)
    assert isinstance(value, str)
    return value


def split_address(value: object) -> tuple[str, int]:
    """Host and port of an address "host:port"; an IPv6 host comes without its brackets.

    Raises:
        ValueError: with the words that follow "expected".
    """
    example = '"host:port" (IPv6 as "[::1]:7000")'
    found = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"an address {example}, found {describe(value)}")
    port = found["port"]
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= PORT_MAX):
        raise ValueError(f"a port of 1 to {PORT_MAX} in {example}, found {_shortened(port)!r} in {value!r}")
    return found["ipv6"] or found["host"], int(port)


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine can reach `host`. Names other than localhost count as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def format_bytes(size: int) -> str:
    """A size in the largest unit below it, exact or with two decimals."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= _UNITS[unit]:
            return f"{size // _UNITS[unit]}{unit}" if size % _UNITS[unit] == 0 else f"{size / _UNITS[unit]:.2f}{unit}"
    return f"{size}B"


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `word` was probably meant to be."""
    found = get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return found[0] if found else None


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _unit_hint(unit: str) -> str:
    binary = f"{unit[0].upper()}iB"
    return f"; did you mean {binary}?" if binary in _UNITS else ""


def _read_budget(value: object) -> int | None:
    if value == "auto":
        return None
    size = read_size(value)
    if size == 0:
        raise ValueError('a size above 0 or "auto", found 0')
    return size


def _read_bandwidth(value: object) -> int:
    size = read_size(value)
    if size == 0:
        raise ValueError("a size above 0, in bytes per second, found 0")
    return size


def _read_chunk_bytes(value: object) -> int:
    size = read_size(value)
    if not limits.CHUNK_BYTES_MIN <= size <= limits.CHUNK_BYTES_MAX or size & (size - 1):
        raise ValueError(
            f"a power of two from {format_bytes(limits.CHUNK_BYTES_MIN)} to "
            f"{format_bytes(limits.CHUNK_BYTES_MAX)}, "
            f"found {describe(value)}"
        )
    return size


def _one_of(*names: str) -> Callable[[object], str]:
    """A reader of one of several words."""

    def read(value: object) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"one of {', '.join(names)}; found {describe(value)}")
        return value

    return read


def _read_flag(value: object) -> bool:
    if value in (True, "true", "yes", "1"):
        return True
    if value in (False, "false", "no", "0"):
        return False
    raise ValueError(f"true or false, found {describe(value)}")


def _whole(lowest: int, highest: int) -> Callable[[object], int]:
    """A reader of whole numbers within bounds."""

    def read(value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest:
            return value
        hint = "; write it without quotes" if isinstance(value, str) and value.isdecimal() else ""
        raise ValueError(f"a whole number from {lowest} to {highest}, found {describe(value)}{hint}")

    return read


SETTINGS = (
    Setting("cluster", "name", "cluster_name", read_name, required=True),
    Setting("cluster", "parity", "parity", _whole(0, GROUP_SIZE_MAX - 1), 2, numeric=True),
    Setting("cluster", "group_size", "group_size", _whole(1, GROUP_SIZE_MAX), 8, numeric=True),
    Setting("cluster", "epoch", "epoch", _whole(1, EPOCH_MAX), 1, numeric=True),
    Setting("cluster", "reprotect_after_s", "reprotect_after_s", _whole(0, PERIOD_S_MAX), 0, numeric=True),
    Setting("memory", "budget", "budget_bytes", _read_budget),
    Setting("memory", "slots", "slots", _whole(SLOTS_MIN, SLOTS_MAX), SLOTS_MIN, numeric=True),
    Setting("memory", "chunk_bytes", "chunk_bytes", _read_chunk_bytes, 1 << 20),
    Setting("memory", "closed_job_s", "closed_job_s", _whole(0, CLOSED_JOB_S_MAX), 86400, numeric=True),
    Setting("security", "keys_dir", "keys_dir", read_text),
    Setting("security", "bulk", "bulk_mode", _one_of(*BULK_MODES), "digest"),
    Setting("http", "address", "http_address", read_address),
    Setting("http", "allow_remote", "http_allow_remote", _read_flag, default=False),
    Setting("trainers", "address", "trainers_address", read_address),
    Setting("daemon", "socket", "socket", read_text),
    Setting("daemon", "socket_group", "socket_group", read_name),
    Setting("scrub", "period_s", "scrub_period_s", _whole(0, PERIOD_S_MAX), 600, numeric=True),
    Setting("scrub", "bandwidth", "scrub_bytes_per_s", _read_bandwidth, 256 << 20),
    Setting("scrub", "cpu_percent", "scrub_cpu_percent", _whole(1, 100), 5, numeric=True),
    Setting("drill", "period_s", "drill_period_s", _whole(0, PERIOD_S_MAX), 600, numeric=True),
    Setting("durable", "dir", "durable_dir", read_text),
    Setting("durable", "every_s", "durable_every_s", _whole(0, PERIOD_S_MAX), 1800, numeric=True),
    Setting("durable", "every_steps", "durable_every_steps", _whole(0, limits.STEP_MAX), 0, numeric=True),
    Setting("durable", "keep", "durable_keep", _whole(1, KEEP_MAX), 2, numeric=True),
    Setting("durable", "grace_s", "durable_grace_s", _whole(0, GRACE_S_MAX), 20, numeric=True),
    Setting("durable", "after_lives", "durable_after_lives", _whole(0, LIVES_MAX), 0, numeric=True),
    Setting("daemon", "state_dir", "state_dir", read_text),
    Setting("daemon", "engine", "engine", _one_of(*ENGINE_NAMES), "auto"),
)
