"""Objects of S3 and its like (Google's and Microsoft's): written in parts, read by ranges, listed, removed.

Covers one place, a URL such as s3://BUCKET/PREFIX, and no torch. What a copy or an export is, and when it counts as
whole, is `object_copies`' and `export`'s. Needs obstore (`holdfast[s3]`), which takes
credentials and endpoints from the environment as the vendors' own tools do. Whatever it reports becomes an OSError, so
that a bucket fails as a directory does. An object has its name once it is whole; there is no renaming worth the name.
"""

import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from holdfast.coding import RunningDigest

if TYPE_CHECKING:
    from obstore import WritableFile

PART_BYTES = 64 << 20  # of one upload: S3 takes 10,000 parts, so an object may have 625 GiB
PARTS_AT_ONCE_COUNT = 4  # so many parts are in memory besides the state itself
REQUEST_S = 120.0  # one part over 5 Mbit/s
CONNECT_S = 10.0
RETRIES_S = 60.0  # within which a request that failed is tried again; then a store counts as not to be had
COMPLAINT_CHARS_MAX = 400  # of what a store answers, which may be a page of XML

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_URL = re.compile(r"(?:s3|gs|az)://[^/]+(?:/.*)?")


def is_url(place: str) -> bool:
    """Whether a place is one of an object store, and no directory."""
    return _URL.fullmatch(place) is not None


@dataclass(frozen=True, slots=True)
class Listed:
    """One object, as its store lists it."""

    name: str
    size_bytes: int
    changed_s: float  # since 1970


class Objects:
    """The objects below a URL. Names are relative to it. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        """Open a place; nothing is asked of the store yet.

        Raises:
            OSError: it is none, or obstore is not installed.
        """
        self.url = url.rstrip("/")
        try:
            import obstore  # noqa: PLC0415  # optional, and only who has such a place needs it
            from obstore.store import from_url  # noqa: PLC0415
        except ImportError as error:
            raise OSError(f"{url} needs obstore: pip install 'holdfast[s3]' on every node") from error
        self._api = obstore
        with self._said():
            self._store = from_url(
                self.url,
                client_options={
                    "timeout": timedelta(seconds=REQUEST_S),
                    "connect_timeout": timedelta(seconds=CONNECT_S),
                    # Whoever names an endpoint that speaks plain HTTP means it; without one there is none.
                    "allow_http": any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS),
                },
                retry_config={"retry_timeout": timedelta(seconds=RETRIES_S)},
            )

    def names(self, below: str = "") -> list[Listed]:
        """All objects below a name, in order.

        Raises:
            OSError: the store does not tell; so all that follow.
        """
        with self._said():
            rows = [row for batch in self._api.list(self._store, below or None) for row in batch]
        return sorted(
            (Listed(row["path"], row["size"], row["last_modified"].timestamp()) for row in rows),
            key=lambda row: row.name,
        )

    def exists(self, name: str) -> bool:
        """Whether there is an object of that name."""
        with self._said():
            try:
                self._api.head(self._store, name)
            except FileNotFoundError:
                return False
        return True

    def put(self, name: str, content: bytes) -> None:
        """Write a small object."""
        with self._said():
            self._api.put(self._store, name, content)

    def get(self, name: str) -> bytes:
        """Read a small object."""
        with self._said():
            return self._api.get(self._store, name).bytes().to_bytes()

    def read(self, name: str, offset: int, length: int) -> io.BytesIO:
        """Read a range, in parts."""
        whole = io.BytesIO()
        with self._said():
            for start in range(offset, offset + length, PART_BYTES):
                size = min(PART_BYTES, offset + length - start)
                whole.write(self._api.get_range(self._store, name, start=start, length=size))
        whole.seek(0)
        return whole

    def digest(self, name: str) -> int:
        """Read an object and digest it, as `holdfast.coding.chunk_digest` would."""
        running = RunningDigest()
        with self._said():
            for part in self._api.get(self._store, name).stream(min_chunk_size=PART_BYTES // 8):
                running.add(part)
        return running.value

    @contextmanager
    def write(self, name: str) -> Iterator["Upload"]:
        """A stream into a new object, which is there once this ends without an error."""
        with self._said():
            file = self._api.open_writer(self._store, name, buffer_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE_COUNT)
        upload = Upload(self, file)
        yield upload  # after an error the file is dropped unclosed: no object comes of it
        upload.close()

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are gone already are fine."""
        listed = list(names)
        if listed:
            with self._said():
                self._api.delete(self._store, listed)

    @contextmanager
    def _said(self) -> Iterator[None]:
        """What the store reports, as an OSError of one line."""
        try:
            yield
        except OSError as error:
            raise type(error)(self._brief(error)) from error
        except (self._api.exceptions.BaseError, ValueError) as error:
            raise OSError(self._brief(error)) from error

    def _brief(self, error: Exception) -> str:
        text = " ".join(str(error).partition("Debug source:")[0].split())
        return f"{self.url}: {text}"[:COMPLAINT_CHARS_MAX]


class Upload(io.RawIOBase):
    """What is written into one object; digests it in passing."""

    def __init__(self, objects: Objects, file: "WritableFile") -> None:
        super().__init__()
        self._objects, self._file = objects, file
        self.running, self.size_bytes = RunningDigest(), 0

    def writable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size_bytes

    def write(self, content: Any) -> int:  # noqa: ANN401  # any buffer, as the base class says
        """Write a buffer whole."""
        flat = memoryview(content).cast("B")
        with self._objects._said():  # noqa: SLF001  # one class in two: a place and a stream into it
            # A copy: obstore keeps what it is given until a part is full; torch writes from memory that it uses again.
            self._file.write(bytes(flat))
        self.running.add(flat)
        self.size_bytes += len(flat)
        return len(flat)

    def close(self) -> None:
        """Send what is left: the object is there when this returns."""
        if not self.closed:
            with self._objects._said():  # noqa: SLF001
                self._file.close()
            super().close()

    def __del__(self) -> None:
        """An upload that was not closed is given up; the base class would complete it."""


class ObjectFolder:
    """Objects that belong together, as a directory's files do: one checkpoint.

    Attributes:
        written: name -> (digest, bytes) of what was written through this.
    """

    def __init__(self, objects: Objects, prefix: str) -> None:
        self.objects, self.prefix = objects, prefix
        self.written: dict[str, tuple[int, int]] = {}

    def __str__(self) -> str:
        """Its URL."""
        return f"{self.objects.url}/{self.prefix}".rstrip("/")

    def name(self, file: str) -> str:
        """An object's name below the place."""
        return f"{self.prefix}/{file}" if self.prefix else file

    def files(self) -> list[Listed]:
        """What there is."""
        return self.objects.names(self.prefix)

    def put(self, file: str, content: bytes) -> None:
        """Write a small object."""
        running = RunningDigest()
        running.add(content)
        self.objects.put(self.name(file), content)
        self.written[file] = (running.value, len(content))

    def clear(self) -> None:
        """Remove all."""
        self.written.clear()
        self.objects.delete(row.name for row in self.files())
