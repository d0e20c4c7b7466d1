"""Whether the data is where the config says, and whether it makes a batch."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from cae_mm.doctor.case import Case, Finding
from cae_mm.doctor.failures import explain, failure

SMALL_LIST = 2**20  # bytes; longer lists of images are not read


def check_data(case: Case) -> Iterator[Finding]:
    """Missing folders and lists; too few images for a batch."""
    if case.unusable_scopes:
        return  # the model's check says so
    for key, node in case.datasets.items():
        if '://' in str(node.get('data_root')):
            continue  # not on this machine
        dataset = case.build_dataset(node)
        if isinstance(dataset, Exception):
            yield failure(case, key, dataset)
            continue
        missing = list(_missing(case, key, dataset))
        yield from missing
        if not missing and key == 'train_dataloader.dataset':
            yield from _check_count(case, key, dataset)


def _missing(case: Case, key: str, dataset: Any) -> Iterator[Finding]:
    level = 'warning' if key.startswith('test_dataloader') else 'error'
    paths = {'data_root': getattr(dataset, 'data_root', None), 'ann_file': dataset.ann_file}
    prefixes = dataset.data_prefix
    for name, path in prefixes.items():
        paths['data_prefix' if len(prefixes) == 1 else f'data_prefix.{name}'] = path
    for name, path in paths.items():
        if path and not Path(path).exists():
            where = f'{key}.{name}'
            yield case.found(
                level,
                where,
                f'{Path(path).absolute()} does not exist',
                f'put the data there, or set {where}',
            )
            if name == 'data_root':
                return


def _check_count(case: Case, key: str, dataset: Any) -> Iterator[Finding]:
    """Compare the number of images with what one iteration of an epoch takes."""
    loader = case.get('train_dataloader')
    sampler = str((loader.get('sampler') or {}).get('type', 'DefaultSampler'))
    wanted = (loader.get('batch_size') or 1) * case.machine.processes
    if not sampler.endswith('DefaultSampler') or not _is_small(dataset, wanted):
        return
    error = case.attempt(dataset.full_init)
    if isinstance(error, Exception):
        remedy = 'look at what is in the folder, and at extensions and ann_file'
        yield case.found('error', key, explain(error), remedy)
        return
    images = -(-len(dataset) // case.machine.processes)  # of one process, as the sampler deals
    if len(dataset) == 0 or (loader.get('drop_last') and images < loader['batch_size']):
        yield case.found(
            'error',
            'train_dataloader.batch_size',
            f'{len(dataset)} images are {images} a process, less than a batch, and drop_last '
            'leaves out what is no full batch: no iteration is left',
            f'set train_dataloader.batch_size={max(images, 1)} or less, or '
            'train_dataloader.drop_last=False',
        )


def _is_small(dataset: Any, wanted: int) -> bool:
    """Whether reading the list of images is quick, or there may be too few of them."""
    if dataset.ann_file:
        return os.path.getsize(dataset.ann_file) < SMALL_LIST
    folders = [path for path in dataset.data_prefix.values() if path] or [dataset.data_root]
    files = (file for folder in folders for _, _, files in os.walk(folder) for file in files)
    return len(list(islice(files, 2 * wanted + 1))) <= 2 * wanted
