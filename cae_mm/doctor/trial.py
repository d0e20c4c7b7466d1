"""Build everything and send one batch through the model; what raises is reported.

The model is on the meta device: it has shapes but no memory, and nothing is computed.
"""

from collections.abc import Iterator
from copy import deepcopy
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.dataset import BaseDataset, Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import FUNCTIONS

from cae_mm.doctor.case import Case, get
from cae_mm.doctor.data import check_count, make_sample, open_training_data
from cae_mm.doctor.finding import Finding, explain, failure, type_name

MAX_TRIED = 8  # images of which a batch is made, some may be skipped


def check_build(case: Case) -> Iterator[Finding]:
    """Build the model, the steps of all pipelines and the optimizer."""
    for scope, error in case.unusable_scopes.items():
        text = f'model and data are not checked: {scope} cannot be imported here: {explain(error)}'
        yield Finding('note', 'model', text, 'python -m cae_mm.doctor tells how to install it')
    if isinstance(case.built, Exception):
        yield failure(case, 'model', case.built)
        text = 'it cannot be built: what depends on it (weights, positions, ...) is not checked'
        yield Finding('note', 'model', text, 'look again when it can be')
    for key, built in case.transforms.items():
        if isinstance(built, Exception):
            yield failure(case, key, built)
    wrapper = deepcopy(case.get('optim_wrapper'))
    asks_for_gpu = type_name(wrapper) == 'AmpOptimWrapper' and case.machine.device == 'cuda'
    if case.model is None or not wrapper or (asks_for_gpu and not torch.cuda.is_available()):
        return
    get(wrapper, 'optimizer', {}).pop('fused', None)  # needs parameters with memory
    built = case.attempt(build_optim_wrapper, case.model, wrapper)
    if isinstance(built, Exception):
        yield failure(case, 'optim_wrapper', built)


def check_batch(case: Case) -> Iterator[Finding]:
    """Make a batch with the training pipeline, and compute the losses of its shapes."""
    key = find_training_key(case)
    if key is None or any(isinstance(step, Exception) for step in find_steps(case, key)):
        return
    dataset = open_training_data(case, key)
    if dataset is not None:
        yield from check_count(case, key, dataset)
    size = min(case.get('train_dataloader.batch_size', 2), 2)
    error = case.attempt(_run, case, key, dataset, size)
    if isinstance(error, NotImplementedError) or 'meta tensor' in str(error):
        text = 'what follows depends on values, and was not tried: nothing is computed here'
        yield Finding('note', failure(case, 'model', error).key, text, 'start the run to see more')
    elif isinstance(error, Exception):
        yield failure(case, 'train_dataloader', error)


def find_training_key(case: Case) -> str | None:
    """Key of the dataset of training, the first where there are several."""
    return next((key for key in case.datasets if key.startswith('train_dataloader')), None)


def find_steps(case: Case, key: str) -> list[Any]:
    """The transforms of the dataset at ``key``, or exceptions, in their order."""
    return [step for k, step in case.transforms.items() if k.startswith(f'{key}.pipeline.')]


def make_samples(case: Case, key: str, dataset: Any, size: int) -> list[dict[str, Any]]:
    """Load and transform ``size`` samples, of MAX_TRIED images at most.

    Args:
        case: Its transforms can be built.
        key: Of the dataset.
        dataset: What ``open_training_data`` returns: None for an image of noise.
        size: Of the batch.
    """
    with TemporaryDirectory() as folder:
        samples = [make_sample(Path(folder))] * MAX_TRIED
        if isinstance(dataset, BaseDataset) and len(dataset):
            samples = [dataset.get_data_info(i % len(dataset)) for i in range(MAX_TRIED)]
        results = (Compose(find_steps(case, key))(deepcopy(sample)) for sample in samples)
        usable = (result for result in results if result is not None)  # or the Runner draws others
        batch = list(islice(usable, size))
    if not batch:
        raise ValueError(f'{key}.pipeline can use none of the first {MAX_TRIED} images')
    return list(islice(cycle(batch), size))


def make_batch(case: Case, key: str, dataset: Any, size: int) -> dict[str, Any]:
    """Collate what ``make_samples`` returns, as the loader of training would."""
    collate: Any = FUNCTIONS.get(case.get('train_dataloader.collate_fn.type', 'pseudo_collate'))
    return collate(make_samples(case, key, dataset, size))


def _run(case: Case, key: str, dataset: Any, size: int) -> None:
    if case.model is None:
        make_samples(case, key, dataset, size)
        return
    data = case.model.data_preprocessor(make_batch(case, key, dataset, size), True)
    case.model._run_forward(data, mode='loss')
