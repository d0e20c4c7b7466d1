"""Whether the data is where the config says, and samples of it for one batch."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS
from PIL import Image

from cae_mm.doctor.case import Case
from cae_mm.doctor.finding import Finding, explain, failure
from cae_mm.engine.data import check_dataset, describe_shortage

MAX_IMAGES, MAX_LIST = 100_000, 2**24  # files and bytes of a list that are read in a second
WIDTH, HEIGHT = 400, 300  # of the image that stands for those that are not here


def check_data(case: Case) -> Iterator[Finding]:
    """Look for folders and lists; that of training is opened by ``open_training_data``."""
    for key, dataset in _build_datasets(case):
        if isinstance(dataset, Exception):
            yield failure(case, key, dataset)
            continue
        level = 'warning' if key.startswith('test_dataloader') else 'error'
        for name, path in _find_missing(dataset).items():
            text = f'{Path(path).absolute()} does not exist'
            remedy = 'put the data there, or set settings.data_root'
            yield case.finding(level, f'{key}.{name}', text, remedy)
        if not _find_missing(dataset) and (dataset.ann_file or _is_small(dataset)):
            outcome = case.attempt(check_dataset, dataset)
            if isinstance(outcome, Exception):
                yield case.finding(level, key, explain(outcome))
            else:
                yield from (case.finding('warning', key, text) for text in outcome)


def open_training_data(case: Case, key: str, large: bool = False) -> Any:
    """The dataset at ``key`` with its list read, or the exception; None if it is not here.

    One whose list takes long to read counts as absent, unless ``large``.
    """
    dataset = dict(_build_datasets(case)).get(key)
    if dataset is None or isinstance(dataset, Exception):
        return None  # not on this machine, or `check_data` tells
    if _find_missing(dataset) or not (large or _is_small(dataset)):
        return None
    return case.attempt(dataset.full_init) or dataset  # nothing, or what it raised


def check_count(case: Case, key: str, dataset: Any) -> Iterator[Finding]:
    """Compare the number of images with what one iteration of an epoch takes."""
    if isinstance(dataset, Exception):
        remedy = 'look at what is in the folder, and at extensions and ann_file'
        yield case.finding('error', key, explain(dataset), remedy)
        return
    loader = case.get('train_dataloader')
    sampler = str((loader.get('sampler') or {}).get('type', 'DefaultSampler'))
    images = -(-len(dataset) // case.machine.processes)  # of one process, as the sampler deals
    if key != 'train_dataloader.dataset' or not sampler.endswith(
        ('DefaultSampler', 'ShardSampler')
    ):
        return
    if images == 0 or (loader.get('drop_last') and images < loader['batch_size']):
        text, remedy = describe_shortage(len(dataset), images)
        yield case.finding('error', 'train_dataloader.batch_size', text, remedy)


def make_sample(folder: Path) -> dict[str, Any]:
    """Describe an image, written to ``folder``, as the datasets of all tasks describe one."""
    image, labels = folder / 'image.png', folder / 'labels.png'
    Image.effect_noise((WIDTH, HEIGHT), 100).convert('RGB').save(image)
    Image.new('L', (WIDTH, HEIGHT), 1).save(labels)
    outline = [50, 50, 250, 50, 250, 250, 50, 250]
    instance = dict(bbox=[50, 50, 250, 250], bbox_label=0, ignore_flag=0, mask=[outline])
    return dict(
        img_path=str(image),
        img_id=0,
        sample_idx=0,
        height=HEIGHT,
        width=WIDTH,
        gt_label=0,
        seg_map_path=str(labels),
        seg_fields=[],
        label_map=None,
        reduce_zero_label=False,
        instances=[instance],
    )


def _build_datasets(case: Case) -> Iterator[tuple[str, Any]]:
    """Each dataset of this machine without its pipeline, or the exception that it raised."""
    if not case.unusable_scopes:  # said of the model
        for key, node in case.datasets.items():
            # those that wrap another one, such as mmdet's MultiImageMixDataset, have no files
            if '://' not in str(node.get('data_root')) and 'dataset' not in node:
                yield key, case.build(DATASETS, node | dict(pipeline=[], lazy_init=True))


def _find_missing(dataset: Any) -> dict[str, str]:
    """Paths of a dataset that do not exist, by argument; the root alone if that is missing."""
    paths = dict(data_root=getattr(dataset, 'data_root', None), ann_file=dataset.ann_file)
    prefixes = dataset.data_prefix
    for name, path in prefixes.items():
        paths['data_prefix' if len(prefixes) == 1 else f'data_prefix.{name}'] = path
    missing = {name: path for name, path in paths.items() if path and not Path(path).exists()}
    return {'data_root': missing['data_root']} if 'data_root' in missing else missing


def _is_small(dataset: Any) -> bool:
    """Whether reading the list of images is quick."""
    if dataset.ann_file:
        return os.path.getsize(dataset.ann_file) < MAX_LIST
    folders = [path for path in dataset.data_prefix.values() if path] or [dataset.data_root]
    files = (file for folder in folders for _, _, files in os.walk(folder) for file in files)
    return len(list(islice(files, MAX_IMAGES + 1))) <= MAX_IMAGES
