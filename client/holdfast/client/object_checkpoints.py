"""Torch's own reader and writer of checkpoints, on objects instead of files.

Covers what torch asks of a file system, as far as one checkpoint needs it. Paths are names of files in one folder.
"""

import io
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from holdfast.client.objects import ObjectFolder
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter


class ObjectWriter(FileSystemWriter):
    """Writes one checkpoint; its table comes last, as in a directory."""

    def __init__(self, folder: ObjectFolder) -> None:
        super().__init__(Path(), thread_count=1, sync_files=False)
        self.fs = cast("Any", _Files(folder))  # torch's own readers of other places set it in the same way


class ObjectReader(FileSystemReader):
    """Reads one checkpoint: the bytes of each tensor at once, so that it costs one request or, large, a few."""

    def __init__(self, folder: ObjectFolder) -> None:
        super().__init__(Path())
        self.fs, self._folder = cast("Any", _Files(folder)), folder

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:  # noqa: ANN401  # torch's signature
        assert isinstance(file, _Named)
        return self._folder.objects.read(self._folder.name(file.name), sinfo.offset, sinfo.length)


class _Named(io.IOBase):
    """Stands for a file until it is known which bytes of it are wanted."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class _Files(FileSystemBase):
    def __init__(self, folder: ObjectFolder) -> None:
        self._folder = folder

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any, None, None]:  # noqa: ANN401
        file = str(path)
        if mode == "wb":
            with self._folder.objects.write(self._folder.name(file)) as upload:
                yield upload
            self._folder.written[file] = (upload.running.value, upload.size_bytes)
        elif file.endswith(".metadata"):
            yield io.BytesIO(self._folder.objects.get(self._folder.name(file)))
        else:
            yield _Named(file)

    def concat_path(self, path: Any, suffix: str) -> Path:  # noqa: ANN401
        return Path(path) / suffix

    def rename(self, path: Any, new_path: Any) -> None:  # noqa: ANN401
        """Torch writes its table under another name first. A rename is a copy here, and the table is small."""
        content = self._folder.objects.get(self._folder.name(str(path)))
        self.rm_file(path)
        self._folder.put(str(new_path), content)

    def init_path(self, path: Any) -> Path:  # noqa: ANN401
        return Path(path)

    def mkdir(self, path: Any) -> None:  # noqa: ANN401
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ANN401
        return True

    def exists(self, path: Any) -> bool:  # noqa: ANN401
        return self._folder.objects.exists(self._folder.name(str(path)))

    def rm_file(self, path: Any) -> None:  # noqa: ANN401
        self._folder.objects.delete([self._folder.name(str(path))])
        self._folder.written.pop(str(path), None)
