"""Where each image of a folder of tar shards lies.

Shards are tars as https://github.com/webdataset/webdataset reads them: of a member ``a/b.jpg`` what
stands before the first dot of the file name, ``a/b``, is the key; ``a/b.cls`` holds its label.
"""

import logging
import os
import re
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.logging import print_log
from tqdm.contrib.concurrent import thread_map

from cae_mm.checkpoints.unpickler import check_records

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.pgm', '.tif', '.tiff', '.webp')
INDEX_FILE = 'index.npz'  # beside the shards
NO_LABEL = -1
END = bytes(512)  # a block of zeros stands behind the last member of a tar
THREADS = 16  # that read headers, which is waiting, on storage over a network above all
COLUMNS = {'shard': 'i4', 'offset': 'i8', 'size': 'i8', 'label': 'i4'}  # beside an image's name
MAX_LABEL = 20  # bytes
MEMBER = re.compile(r'((?:.*/)?[^./][^./]*)(\.[^/]*)')  # key and ending


class Image(NamedTuple):
    """An image of a shard: the member's name, where its content is in bytes, its label."""

    name: str
    offset: int
    size: int
    label: int = NO_LABEL


class Shard(NamedTuple):
    """The images of a shard, and what is wrong with it, if anything is."""

    images: list[Image]
    problem: str = ''
    warning: str = ''


class Index(NamedTuple):
    """Where the images of a folder of shards lie.

    Args:
        shards: Structured array with shape (S,): ``name``, and ``size`` in bytes.
        images: Structured array with shape (N,), shard by shard: ``shard`` (its number) and what
            ``Image`` has, the name in UTF-8.
    """

    shards: np.ndarray
    images: np.ndarray


def split_name(name: str) -> tuple[str, str]:
    """Return key and ending of a member's name; empty for hidden files and those without a dot."""
    match = MEMBER.fullmatch(name)
    return (match[1], match[2].lower()) if match else ('', '')


def load_index(folder: Path, skip_broken: bool = False) -> Index:
    """Read the index of a folder of shards, or make it if there is none or a shard is newer.

    A new one is kept beside the shards, if they are whole and the folder can be written to.

    Raises:
        FileNotFoundError: If there are no shards.
        ValueError: If one is broken, unless ``skip_broken``: then what is whole of it is taken.
    """
    paths = sorted(folder.glob('*.tar'))
    if not paths:
        raise FileNotFoundError(
            f'no *.tar in {folder.absolute()}: `python tools/make_shards.py IMAGES OUT` writes '
            'some; image files are for settings.data_root'
        )
    shards = _structured([(path.name, path.stat().st_size) for path in paths], size='i8')
    file = folder / INDEX_FILE
    if file.is_file() and all(path.stat().st_mtime <= file.stat().st_mtime for path in paths):
        kept = _read_index(file)
        if kept.shards.tolist() == shards.tolist():
            index = Index(shards, kept.images)
            _check_places(index, file)
            return index
    return _make_index(paths, shards, skip_broken)


def _read_index(file: Path) -> Index:
    try:
        with zipfile.ZipFile(file) as archive:
            check_records(archive, file.stat().st_size)
        with np.load(file) as arrays:  # refuses pickled objects
            index = Index(arrays['shards'], arrays['images'])
        if not all(isinstance(part, np.ndarray) for part in index):
            raise ValueError('no arrays')
        return index
    except Exception as error:  # as with any file that somebody has written to
        raise ValueError(f'{file} is damaged: remove it, it is made anew ({error})') from error


def _check_places(index: Index, file: Path) -> None:
    """Refuse places outside the shards, as an index from elsewhere can name any."""
    images, sizes = index.images, index.shards['size']
    if images.size == 0:
        return
    columns = [(name, images.dtype[name].kind) for name in images.dtype.names or ()]
    whole = columns == [('name', 'S'), *((name, 'i') for name in COLUMNS)] and images.ndim == 1
    if whole and 0 <= images['shard'].min() and images['shard'].max() < len(sizes):
        room = sizes[images['shard']] - images['offset']
        if min(images['offset'].min(), images['size'].min(), (room - images['size']).min()) >= 0:
            return
    raise ValueError(f'{file} names places outside the shards: remove it, it is made anew')


def _make_index(paths: Sequence[Path], shards: np.ndarray, skip_broken: bool) -> Index:
    bar = dict(desc='headers of shards', unit=' shards', leave=False, dynamic_ncols=True)
    scanned = thread_map(scan_shard, paths, max_workers=THREADS, **bar)
    warnings = [shard.warning for shard in scanned if shard.warning]
    if problems := [shard.problem for shard in scanned if shard.problem]:
        if not skip_broken:
            raise ValueError(
                f'{"; ".join(problems)}. Copy or write it anew, or '
                'train_dataloader.dataset.skip_broken=True takes what is whole'
            )
        warnings += [f'{problem}. What is whole is taken' for problem in problems]
    for text in warnings:
        print_log(text, logger='current', level=logging.WARNING)
    rows = [
        (os.fsencode(image.name), number, *image[1:])
        for number, shard in enumerate(scanned)
        for image in shard.images
    ]
    images = _structured(rows, **COLUMNS)
    index = Index(shards, images)
    if not problems:
        _keep(index, paths[0].parent / INDEX_FILE)
    return index


def _structured(rows: Sequence[tuple[Any, ...]], **types: str) -> np.ndarray:
    """Make an array of rows whose first value is a name."""
    names = np.array([row[0] for row in rows])
    array = np.empty(len(rows), dtype=[('name', names.dtype), *types.items()])
    array['name'] = names
    for column, name in enumerate(types, start=1):
        array[name] = [row[column] for row in rows]
    return array


def _keep(index: Index, file: Path) -> None:
    draft = file.with_name(f'{file.name}.{os.getpid()}.tmp')
    try:
        with draft.open('wb') as stream:
            np.savez(stream, **index._asdict())
        draft.replace(file)  # whole, even if several processes do this at once
    except OSError as error:
        text = f'{file} cannot be written ({error}): headers are read anew in each run'
        print_log(text, logger='current', level=logging.WARNING)


def scan_shard(path: Path) -> Shard:
    """Read the headers of a shard; an image that is cut short is not listed."""
    try:
        tar = tarfile.open(path, 'r:')
    except OSError:
        raise
    except Exception as error:  # damaged headers raise almost anything
        return Shard([], f'{path} is no uncompressed tar file: {error}')
    with tar:
        return _scan(tar, path)


def _scan(tar: Any, path: Path) -> Shard:
    size = path.stat().st_size
    if problem := _read_headers(tar):
        return Shard([], f'{path} is damaged: {problem}')
    files = [member for member in tar.members if member.isreg()]
    whole = [member for member in files if member.offset_data + member.size <= size]
    names = [(member, *split_name(member.name)) for member in whole]
    labels = {key: _read_label(tar, path, m) for m, key, ending in names if ending == '.cls'}
    images = [
        Image(m.name, m.offset_data, m.size, labels.get(key, NO_LABEL))
        for m, key, ending in names
        if ending in EXTENSIONS
    ]
    others = [m for m, _, ending in names if ending.endswith(EXTENSIONS)]
    warning = ''
    if len(others) > len(images):
        warning = f'{path}: {len(others) - len(images)} images have a further dot in their names'
        warning += ', such as a.seg.png: left out, as these are not images to webdataset'
    return Shard(images, _find_problem(tar, path, files, whole), warning)


def _read_headers(tar: Any) -> str:
    """Fill ``tar.members``; say what is wrong if these are no headers of a tar."""
    try:
        for member in tar:
            if member.size < 0:  # tarfile would go back, again and again
                return f'{member.name} has {member.size} bytes'
    except tarfile.ReadError:  # its message names nothing, see `_find_problem`
        return ''
    except Exception as error:  # as above
        return repr(error)
    return ''


def _find_problem(tar: Any, path: Path, files: list[Any], whole: list[Any]) -> str:
    """Say where a tar breaks off: tarfile is silent about headers that it cannot read."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(len(END)) == END:
        return ''
    if len(files) > len(whole):
        return f'{path} is cut short in {files[len(whole)].name}'
    return f'{path} is cut short or damaged after {files[-1].name if files else "nothing"}'


def _read_label(tar: Any, path: Path, member: tarfile.TarInfo) -> int:
    text = tar.extractfile(member).read(MAX_LABEL + 1)
    try:
        label = int(text[:MAX_LABEL])
        if len(text) > MAX_LABEL or not 0 <= label < 2**31:
            raise ValueError('more digits than a class has')
        return label
    except ValueError as error:
        message = f'{path}/{member.name} holds {text[:20]!r}, not the number of a class'
        raise ValueError(message) from error
