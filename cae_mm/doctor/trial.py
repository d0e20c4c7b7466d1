"""Build everything and send one batch through the model; what raises is reported.

The model is on the meta device: it has shapes but no memory, and nothing is computed.
"""

from collections.abc import Iterator
from copy import deepcopy
from itertools import islice
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
    key = next((key for key in case.datasets if key.startswith('train_dataloader')), None)
    steps = [step for k, step in case.transforms.items() if k.startswith(f'{key}.pipeline.')]
    if key is None or any(isinstance(step, Exception) for step in steps):
        return
    dataset = open_training_data(case, key)
    if dataset is not None:
        yield from check_count(case, key, dataset)
    error = case.attempt(_run, case, key, steps, dataset)
    if isinstance(error, NotImplementedError) or 'meta tensor' in str(error):
        text = 'what follows depends on values, and was not tried: nothing is computed here'
        yield Finding('note', failure(case, 'model', error).key, text, 'start the run to see more')
    elif isinstance(error, Exception):
        yield failure(case, 'train_dataloader', error)


def _run(case: Case, key: str, steps: list[Any], dataset: Any) -> None:
    with TemporaryDirectory() as folder:
        samples = [make_sample(Path(folder))] * MAX_TRIED
        if isinstance(dataset, BaseDataset) and len(dataset):
            samples = [dataset.get_data_info(i % len(dataset)) for i in range(MAX_TRIED)]
        results = (Compose(steps)(deepcopy(sample)) for sample in samples)
        usable = (result for result in results if result is not None)  # or the Runner draws others
        batch = list(islice(usable, min(case.get('train_dataloader.batch_size', 2), 2)))
    if not batch:
        raise ValueError(f'{key}.pipeline can use none of the first {MAX_TRIED} images')
    if case.model is not None:
        collate: Any = FUNCTIONS.get(case.get('train_dataloader.collate_fn.type', 'pseudo_collate'))
        data = case.model.data_preprocessor(collate(batch), True)
        case.model._run_forward(data, mode='loss')
