"""Files that are whole or not there, and which of a run's checkpoints can be relied on."""

import errno
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

BACKEND = 'cae_mm.whole'  # name of the way to write files
UNFINISHED = '.unfinished'  # ends the name of a file that is being written
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHECKPOINT = re.compile(r'(epoch|iter)_\d+\.pth')


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears, with its folder, when all of it lies on the disk.

    Raises:
        OSError: If it cannot be written; what was there before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with unfinished.open('wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(path.parent).free
        text = (
            f'{path} cannot be written: it takes {_megabytes(len(data))}, and '
            f'{_megabytes(free)} are free ({os.strerror(error.errno)}). Files written before are '
            'whole: make room and start again, a training with --resume'
        )
        raise OSError(error.errno, text) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def _megabytes(size: int) -> str:
    return f'{size / 1e6:.1f} MB'


@register_backend(BACKEND, force=True)
class WholeFiles(LocalBackend):
    """mmengine's access to local files; a file that is written is whole or not there."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file."""
        write_whole(Path(filepath), obj)


def find_damage(path: Path) -> str | None:
    """Read a file, and say what is wrong with it, by the CRC-32 of each of its parts.

    ``torch.save`` writes these; formats without them are taken as they are.
    """
    try:
        with path.open('rb') as file:
            if path.suffix == '.safetensors' or file.read(1) == b'\x80':  # torch < 1.6
                return None
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except Exception as error:  # a damaged zip file raises almost anything
        return str(error) or repr(error)
    return part and f'the checksum of {part} is another'


def list_checkpoints(folder: Path) -> list[Path]:
    """List checkpoints of a run: first that which it named as its last, then by age."""
    pointer = folder / 'last_checkpoint'
    last = Path(pointer.read_text(errors='replace').strip() if pointer.is_file() else '')
    folders = dict.fromkeys([folder, last.parent] if last.name else [folder])
    files = [p for f in folders for p in f.glob('*.pth') if CHECKPOINT.fullmatch(p.name)]
    files.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    named = [path for path in (last, folder / last.name) if path.is_file()]  # it may have moved
    return list({path.absolute(): path for path in named + files}.values())


def find_last_whole(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Find the checkpoint to go on from; damaged ones are named and passed over.

    Raises:
        ValueError: If all are damaged.
    """
    damages = []
    for path in list_checkpoints(folder):
        damage = find_damage(path)
        if damage is None:
            return path
        damages.append(f'{path} is damaged ({damage})')
        warn(f'{damages[-1]}: the one before is taken')
    if damages:
        raise ValueError(
            f'no checkpoint is whole: {"; ".join(damages)}. Remove them to start from the beginning'
        )
    return None


def check_whole(path: Path) -> None:
    """Raise a ValueError if a file is damaged; it names those beside it that are not."""
    damage = find_damage(path)
    if damage is None:
        return
    others = [other for other in list_checkpoints(path.parent) if other.name != path.name]
    whole = [str(other) for other in others if find_damage(other) is None]
    way = f'these are whole: {", ".join(whole)}' if whole else 'none beside it is whole'
    raise ValueError(f'{path} is damaged ({damage}); {way}')


def remove_unfinished(folder: Path) -> None:
    """Remove what was being written when a run ended."""
    for path in folder.glob('*.pth' + UNFINISHED):
        path.unlink(missing_ok=True)
