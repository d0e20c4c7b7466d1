"""What can be wrong with the data of a run, said before it starts; what stops data workers."""

import json
import mmap
import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import BaseDataset, InfiniteSampler
from mmengine.registry import DATASETS

from cae_mm.datasets.shard_index import INDEX_FILE
from cae_mm.engine.settings import class_name, find_datasets

CATEGORIES = re.compile(rb'"categories"\s*:\s*(?=\[)')
MAX_CATEGORIES = 2**24  # bytes
# seconds without a batch: less than the 600 after which NCCL ends the processes that wait for this
WORKER_TIMEOUT = 300
WORKER_FAULTS = {  # what torch says, and what it means
    'DataLoader timed out': 'the data workers made no batch in time. If a thread that pins memory '
    'has ended, its error is above; else storage hangs, a file takes '
    'for ever (tools/check_images.py finds it), or reading is slower than that: '
    'train_dataloader.timeout=SECONDS (val_dataloader, ...) waits longer, 0 without end',
    'signal: Killed': 'a data worker was killed, by the kernel if memory ran out (`dmesg` says so; '
    "on Slurm the job's limit): take fewer with train_dataloader.num_workers",
    'signal: Bus error': 'a data worker found no shared memory: enlarge /dev/shm (docker run '
    '--shm-size=16g), or take fewer with train_dataloader.num_workers',
    'signal: Segmentation fault': 'a data worker crashed: tools/check_images.py names the images '
    'that no decoder survives',
    'items of ancdata': 'data workers ran out of open files: `ulimit -n 65536` before the run',
    'Too many open files': 'this process ran out of open files: `ulimit -n 65536` before the run',
    'Pin memory thread exited': 'the thread that pins memory ended, its error is above: '
    'train_dataloader.pin_memory=False goes without it',
    'exited unexpectedly': 'a data worker ended: its own message is above, if it had one; '
    'train_dataloader.num_workers=0 shows more',
}


def check_datasets(cfg: Config) -> list[str]:
    """Look for the data of training and validation; folders are listed, no image is read.

    Returns:
        What is allowed, but worth a warning.

    Raises:
        FileNotFoundError: If a folder, a list or all images of a folder are missing.
        ValueError: If something is not what the dataset takes it for.
    """
    loaders = {name: cfg.get(name) for name in ('train_dataloader', 'val_dataloader')}
    warnings = []
    for node in find_datasets(loaders):
        root = node.get('data_root') or ''
        if '://' in root or 'type' not in node:  # plans give batches instead
            continue
        shards = class_name(node) == 'ShardDataset'
        if root and not Path(root).exists():
            raise FileNotFoundError(
                f'no data at {Path(root).absolute()}: set '
                f'settings.{"shards" if shards else "data_root"} to its folder'
            )
        if not shards and root and Path(root, INDEX_FILE).exists():
            raise ValueError(f'{root} holds shards: set settings.shards to it, not data_root')
        kind = node['type']
        if isinstance(kind, str):
            with DATASETS.switch_scope_and_registry(None) as registry:  # that of the config
                kind = registry.get(kind)
        if isinstance(kind, type) and issubclass(kind, BaseDataset):
            dataset = DATASETS.build({**node, 'pipeline': [], 'lazy_init': True})
            warnings += check_dataset(dataset)
    return warnings


def check_dataset(dataset: Any) -> list[str]:
    """Look for the list or the images of a dataset that has not read its list yet.

    Returns and raises what ``check_datasets`` does.
    """
    if dataset.ann_file:
        return _check_list(dataset)
    if hasattr(dataset, 'extensions'):  # mmpretrain's, in small letters
        _check_folder(dataset.img_prefix, tuple(dataset.extensions), 'extensions')
    elif hasattr(dataset, 'img_suffix'):  # mmsegmentation's
        _check_folder(dataset.data_prefix['img_path'], (dataset.img_suffix,), 'img_suffix')
    return []


def _check_folder(folder: str, endings: tuple[str, ...], key: str) -> None:
    if '://' in folder:
        return
    if not os.path.isdir(folder):
        raise FileNotFoundError(f'no folder {os.path.abspath(folder)}: set settings.data_root')
    count = images = 0
    for place, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        for name in folders:
            if os.path.islink(link := os.path.join(place, name)):
                _check_link(Path(link), Path(folder))
        count += len(files)
        names = map(str.lower, files) if key == 'extensions' else files
        images += sum(name.endswith(endings) for name in names)
    if not images:
        raise FileNotFoundError(
            f'no images in {os.path.abspath(folder)}: none of {count} files ends with '
            f'{", ".join(sorted(endings))}. Set settings.data_root to their folder, or the '
            f"dataset's {key}"
        )


def _raise(error: OSError) -> None:
    raise error


def _check_link(link: Path, top: Path) -> None:
    """Refuse a link to a folder in which it is, on the way that was taken from ``top``."""
    target = link.resolve()
    above = [link.parent, *link.parent.parents]
    for place in (folder.resolve() for folder in above[: above.index(top) + 1]):
        if target in (place, *place.parents):
            raise ValueError(
                f'{link} links to {target}, in which it is: the same images would be found over '
                'and over. Remove the link'
            )


def _check_list(dataset: Any) -> list[str]:
    path = dataset.ann_file
    if '://' in path:
        return []
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no list at {os.path.abspath(path)}: set ann_file of the dataset')
    if not os.path.getsize(path):
        raise ValueError(f'{path} is empty')
    if hasattr(dataset, 'COCOAPI'):
        return _check_categories(path, list(dataset.metainfo['classes']))
    if path.endswith('.txt'):
        try:
            Path(path).read_text('utf-8')
        except UnicodeDecodeError as error:  # mmengine fails at passing it on
            raise ValueError(f'{path} is no text in UTF-8: {error}') from error
    return []


def _check_categories(path: str, classes: list[str]) -> list[str]:
    known = read_categories(path)
    remedy = f'Set metainfo.classes of the dataset to names of {known}, in this order'
    if missing := [name for name in classes if name not in known]:
        raise ValueError(f'{path} has no category {", ".join(map(repr, missing))}. {remedy}')
    if [name for name in known if name in classes] != classes:
        raise ValueError(f'{path} has its categories in another order than {classes}. {remedy}')
    others = [repr(name) for name in known if name not in classes]
    text = f'{path} has categories that the config lacks, their objects are left out: '
    return [text + ', '.join(others)] if others else []


def read_categories(path: str) -> list[str]:
    """Names of the categories of a COCO file, in its order, without parsing all the rest.

    Raises:
        ValueError: If it has none.
    """
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        match = CATEGORIES.search(content)
        if match is None:
            raise ValueError(f'{path} has no categories: no COCO file, or one that is cut short')
        text = content[match.end() : match.end() + MAX_CATEGORIES].decode(errors='replace')
    return [category['name'] for category in json.JSONDecoder().raw_decode(text)[0]]


def check_length(loader: Any) -> None:
    """Compare the number of images with what one iteration takes.

    Raises:
        ValueError: If an epoch has no iteration.
    """
    sampler = loader.batch_sampler.sampler
    if len(loader) == 0 and not isinstance(sampler, InfiniteSampler):
        text = describe_shortage(len(loader.dataset), len(sampler))
        raise ValueError(': '.join(text))


def describe_shortage(images: int, share: int) -> tuple[str, str]:
    """What is wrong where a process gets ``share`` images, fewer than a batch, and the way out."""
    return (
        f'{images} images are {share} a process, less than a batch: with drop_last no iteration is '
        'left',
        f'set train_dataloader.batch_size={max(share, 1)} or less, or '
        'train_dataloader.drop_last=False',
    )


@contextmanager
def explained_worker_faults() -> Iterator[None]:
    """Say what a fault of a data worker means, and the way out; torch only says that it was."""
    try:
        try:
            yield
        except (EOFError, ConnectionError):  # a tensor from a worker that may be dying
            time.sleep(1)  # if so, torch's handler of SIGCHLD says it here
            raise
    except (OSError, RuntimeError) as error:
        told = f'{error.__cause__ or ""} {error}'.strip()  # the first of two has the signal
        for sign, text in WORKER_FAULTS.items():
            if sign in told:
                _kill_workers()
                raise RuntimeError(f'{text} ({told})') from error
        raise


def _kill_workers() -> None:
    """End what would be waited for at exit: a worker that hangs may not listen to SIGTERM."""
    for process in multiprocessing.active_children():
        ended = False
        while not ended:  # until it is waited for, torch may raise at any time that it was killed
            with suppress(RuntimeError):
                process.kill()
                process.join()
                ended = True
