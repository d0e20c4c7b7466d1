"""Runs that end at any moment and go on: forked processes, which get real signals."""

import multiprocessing
import os
import signal
import uuid
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builders import cae_config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS
from two_processes import STACK, FixedSamples, train

from cae_mm.checkpoints import read_checkpoint

# all that has a state: an EMA teacher, an average of all weights, schedules; and drop path
CAE: dict[str, Any] = dict(
    model=cae_config(
        data_preprocessor=dict(STACK), teacher_momentum=0.9, backbone=dict(drop_path_rate=0.3)
    ),
    hooks=[dict(type='EMAHook', momentum=0.1)],
    param_scheduler=[
        dict(type='LinearLR', start_factor=0.1, by_epoch=True, end=1, convert_to_iter_based=True),
        dict(type='CosineAnnealingLR', by_epoch=True, begin=1),
    ],
)


@DATASETS.register_module()
class NoisySamples(FixedSamples):
    """Images with noise of three generators, as augmentations draw it."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        noise = np.random.rand() + torch.rand(1).item()
        views = sample['inputs']
        one = isinstance(views, torch.Tensor)
        sample['inputs'] = views + noise if one else tuple(view + noise for view in views)
        return sample


@HOOKS.register_module()
class NoteLosses(Hook):
    """Append number, batch and loss of each step to a file, and end the process where wanted.

    Args:
        file: Ending with the rank.
        at: Before this step, counted from 0, or ...
        sent: ... the process with ``rank`` gets this signal.
    """

    def __init__(self, file: str, at: int = -1, sent: int = 0, rank: int = 0) -> None:
        self.file = f'{file}{get_rank()}'
        self.at = at
        self.sent = sent if rank == get_rank() else 0

    def before_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        """Send it."""
        if runner.iter == self.at and self.sent:
            os.kill(os.getpid(), self.sent)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any, outputs: Any) -> None:
        """Note it."""
        with open(self.file, 'a') as file:
            file.write(f'{runner.iter} {batch_idx} {outputs["loss"].item().hex()}\n')


def noisy_run(kind: str, work_dir: Path, **changes: Any) -> dict[str, Any]:
    """Changes of a run: noise in data and model, a file after each update, all losses noted."""
    views = 2 if kind == 'cae' else 1
    workers = changes.pop('workers', 0)
    batch = changes.pop('batch', 2)
    note = dict(type='NoteLosses', file=str(work_dir.with_suffix('.losses')))
    note |= {key: changes.pop(key) for key in ('at', 'sent', 'rank') if key in changes}
    hooks = [
        dict(type='cae_mm.SafeLoadHook'),
        dict(type='RecordLosses'),
        note,
        *changes.pop('hooks', []),
    ]
    loader = dict(
        batch_size=batch,
        num_workers=workers,
        dataset=dict(type='NoisySamples', views=views),
        sampler=dict(type='DefaultSampler', shuffle=True) | changes.pop('sampler', {}),
    )
    checkpoint = dict(type='cae_mm.CheckpointHook', interval=1, minutes=0, max_keep_ckpts=2)
    checkpoint |= changes.pop('checkpoint', {})
    return dict(train_cfg=dict(by_epoch=True, max_epochs=3)) | dict(
        train_dataloader=loader,
        custom_hooks=hooks,
        experiment_name=uuid.uuid4().hex,  # mmengine keeps what has a name
        default_hooks=dict(checkpoint=checkpoint),
        **changes,
    )


def run(kind: str, work_dir: Path, processes: int = 1, **changes: Any) -> Any:
    """Train; ``resume=True`` goes on."""
    return train(kind, work_dir, processes, **noisy_run(kind, work_dir, **changes))


def start(function: Any, *args: Any, **options: Any) -> BaseProcess:
    """Fork a process, which has all imports, and call a function there."""
    process = multiprocessing.get_context('fork').Process(
        target=_call_alone, args=(function, args, options)
    )
    process.start()
    return process


def _call_alone(function: Any, args: Any, options: Any) -> None:
    os.setpgrp()
    torch.set_num_threads(1)  # no threads come along with a fork
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    function(*args, **options)


def read_losses(work_dir: Path, rank: int = 0) -> dict[int, tuple[int, float]]:
    """Batch and loss of each step, which are the same whenever it was taken again."""
    noted: dict[int, tuple[int, float]] = {}
    for line in work_dir.with_suffix(f'.losses{rank}').read_text().splitlines():
        step, batch, loss = line.split()
        value = int(batch), float.fromhex(loss)
        assert noted.setdefault(int(step), value) == value, f'step {step} was another one before'
    return noted


def same_weights(one: Path, other: Path) -> None:
    """Assert that all of two checkpoints is bit for bit the same, but what tells the time."""
    contents = [read_checkpoint(path).content for path in (one, other)]
    for key in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers'):
        parts = [_flatten(content.get(key), key) for content in contents]
        assert parts[0].keys() == parts[1].keys()
        for name, value in parts[0].items():
            assert np.array_equal(value, parts[1][name]), name


def _flatten(node: Any, name: str) -> dict[str, Any]:
    """All leaves of nested dicts and lists by their path."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if _nests(node) else None
    if items is None:
        return {name: node.numpy() if isinstance(node, torch.Tensor) else node}
    return {k: v for key, child in items for k, v in _flatten(child, f'{name}.{key}').items()}


def _nests(node: Any) -> bool:
    return isinstance(node, list | tuple)


def interrupt_one_of_two(folder: Path, kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    """As one of two processes: one gets SIGUSR1 before the fourth step of nine; both go on."""
    run(kind, folder / 'whole-2', 2, **changes)
    status = None
    try:
        run(kind, folder / 'told-2', 2, **changes, at=3, sent=signal.SIGUSR1, rank=1)
    except SystemExit as end:
        status = end.code
    steps = max(read_losses(folder / 'told-2', get_rank())) + 1
    run(kind, folder / 'told-2', 2, **changes, resume=True)
    noted = [read_losses(folder / name, get_rank()) for name in ('whole-2', 'told-2')]
    return dict(status=status, steps=steps, noted=noted)
