"""Durable copies of a job in an object store: which there are, when one is whole, what is left over and goes.

Nothing can be renamed there, so a copy is ``PLACE/JOB/copy-NUMBER-NODE``, with whoever wrote it in its name: two nodes
that write at once never mix their objects. It is whole when there is an empty object ``step-STEP`` in it, which is
written last and removed first. Otherwise all is as in a directory (`copies`), and torch reads it in the same way.
"""

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from holdfast.client.copies import DIGESTS, LEFT_OVER_S, digest_lines
from holdfast.client.objects import Listed, ObjectFolder, Objects

NAME = re.compile(r"copy-(\d{1,18})-([A-Za-z0-9._-]{1,64})")
MARK = re.compile(r"step-(\d{1,18})")


@dataclass(frozen=True, slots=True, order=True)
class ObjectCopy:
    """One whole copy.

    Attributes:
        number: grows from copy to copy.
        step: of the job.
        place: its URL.
    """

    number: int
    step: int
    place: str


def object_copies(place: str, job: str) -> list[ObjectCopy]:
    """The whole copies of a job, the oldest first.

    Raises:
        OSError: the store does not tell.
    """
    objects = Objects(place)
    return _whole(objects, job, _by_folder(objects.names(job)))


def _by_folder(rows: Iterable[Listed]) -> dict[str, list[Listed]]:
    """The objects of each copy, whole or not."""
    found: dict[str, list[Listed]] = {}
    for row in rows:
        words = row.name.split("/")
        if len(words) == 3 and NAME.fullmatch(words[1]) is not None:
            found.setdefault(words[1], []).append(row)
    return found


def _whole(objects: Objects, job: str, folders: Mapping[str, list[Listed]]) -> list[ObjectCopy]:
    found = []
    for name, files in folders.items():
        named, marks = NAME.fullmatch(name), [mark for file in files if (mark := _mark(file)) is not None]
        if named is not None and marks:
            found.append(ObjectCopy(int(named[1]), int(marks[0][1]), f"{objects.url}/{job}/{name}"))
    return sorted(found)


def _mark(file: Listed) -> re.Match[str] | None:
    return MARK.fullmatch(file.name.rpartition("/")[2])


def folder_of(url: str) -> ObjectFolder:
    """The objects of one copy.

    Raises:
        OSError: that is no place for it.
    """
    place, job, copy = url.rsplit("/", 2)
    return ObjectFolder(Objects(place), f"{job}/{copy}")


def next_folder(place: str, job: str, *, node: str) -> ObjectFolder:
    """Where a node writes its next copy; what an earlier try of it left there is removed.

    Raises:
        OSError: the store does not do that.
    """
    objects = Objects(place)
    number = max((copy.number for copy in _whole(objects, job, _by_folder(objects.names(job)))), default=0) + 1
    folder = ObjectFolder(objects, f"{job}/copy-{number:06d}-{node}")
    folder.clear()
    return folder


def finish(folder: ObjectFolder, *, step: int) -> int:
    """All has been written: from now on it is a copy. Returns its bytes.

    Raises:
        OSError: the store does not do that.
    """
    lines = digest_lines((name, digest, size) for name, (digest, size) in folder.written.items())
    folder.put(DIGESTS, lines.encode())
    folder.put(f"step-{step}", b"")
    return sum(size for _, size in folder.written.values())


def thin(place: str, job: str, *, keep: int) -> None:
    """Remove all but the newest copies, and what dead writers left. A copy loses its list before its content.

    Raises:
        OSError: the store does not do that.
    """
    objects = Objects(place)
    folders = _by_folder(objects.names(job))
    names = [copy.place.rpartition("/")[2] for copy in _whole(objects, job, folders)]
    old, kept = names[:-keep], names[-keep:]
    stale_s = time.time() - LEFT_OVER_S  # noqa: TID251  # compared with the times of objects
    for name, files in folders.items():
        if name in old or (name not in kept and max(file.changed_s for file in files) < stale_s):
            objects.delete(file.name for file in files if _mark(file) is not None)
            objects.delete(file.name for file in files if _mark(file) is None)


def object_damage(url: str, *, part: int, parts: int) -> str:
    """As `copies.damage`, of a copy in an object store."""
    try:
        folder = folder_of(url)
        found = {file.name.rpartition("/")[2]: file for file in folder.files()}
        for line in folder.objects.get(folder.name(DIGESTS)).decode().splitlines()[part::parts]:
            digest, size_bytes, name = line.split(" ", 2)
            if name not in found:
                return f"{name}: expected {size_bytes} bytes, found no such object"
            if found[name].size_bytes != int(size_bytes):
                return f"{name}: expected {size_bytes} bytes, found {found[name].size_bytes}"
            seen = f"{folder.objects.digest(folder.name(name)):016x}"
            if seen != digest:
                return f"{name}: expected digest {digest}, found {seen}"
    except (OSError, ValueError) as error:
        return str(error)
    return ""
