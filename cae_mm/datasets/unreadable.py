"""Which images of a dataset could not be read: reported with a batch, kept in a list."""

import fcntl
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple


class Unreadable(NamedTuple):
    """An image that cannot be read."""

    path: str
    reason: str


_found: list[Unreadable] | None = None  # of this process, while a batch is read that reports them


@contextmanager
def collecting_unreadable() -> Iterator[list[Unreadable]]:
    """Collect what ``LoadImage``, which can hand back an image or nothing, skips meanwhile."""
    global _found
    found: list[Unreadable] = []
    _found = found
    try:
        yield found
    finally:
        _found = None


def get_found() -> list[Unreadable] | None:
    """Where to leave an image that is skipped; None if nobody collects them."""
    return _found


class UnreadableList:
    """A text file with path, tab and reason of images, each path once, in the order they were met.

    Several processes may add to it, one after the other; what a process that was killed left of
    a line is cut off. Paths with a character that is not printable, or with bytes that are not
    UTF-8, stand there as strings of JSON.

    Args:
        path: Of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: set[str] = set()
        self.end = 0  # of what is known of the file, in bytes

    def add(self, images: Iterable[Unreadable] = ()) -> None:
        """Add what is not there yet, and learn what others added."""
        with self.path.open('ab+') as file:
            with suppress(OSError):  # storage without locks: a path may come twice
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self.end)
            whole, newline, rest = file.read().rpartition(b'\n')
            if rest:
                file.truncate(self.end + len(whole) + len(newline))
            self.known |= {_read_path(line) for line in whole.decode().split('\n') if line}
            new = {path: reason for path, reason in images if path not in self.known}
            lines = (f'{_write_path(path)}\t{reason}\n' for path, reason in new.items())
            file.write(''.join(lines).encode(errors='backslashreplace'))
            self.known |= new.keys()
            self.end = file.seek(0, 2)


def _write_path(path: str) -> str:
    return path if path.isprintable() and path[:1] != '"' else json.dumps(path)


def _read_path(line: str) -> str:
    path = line.partition('\t')[0]
    return json.loads(path) if path[:1] == '"' else path
