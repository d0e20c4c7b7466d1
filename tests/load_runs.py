"""A tiny pretraining with all default hooks and data workers, whose resources are watched."""

import os
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from builders import ROOT, make_images
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from cae_mm.engine import CAERunner

CONFIG = ROOT / 'configs/pretrain/cae-rgb_vit-base-p16_4xb128-amp-coslr-300e_custom.py'
WORKERS, BATCH, KEPT = 2, 2, 3
WIDTHS = dict(embed_dims=16, num_heads=2)


class Usage(NamedTuple):
    """What this process and its workers have at a step."""

    step: int
    seconds: float
    own_seconds: float  # of the processor, which other programs do not lengthen
    bytes: int
    worker_bytes: int


def measure(step: int) -> Usage:
    """Ask the kernel."""
    memory = [_read_memory(pid) for pid in ('self', *_list_children())]
    return Usage(step, time.monotonic(), time.process_time(), memory[0], sum(memory[1:]))


def _read_memory(pid: str) -> int:
    lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    status = dict(line.split(':', 1) for line in lines)
    return int(status['VmRSS'].split()[0]) * 1024


def _list_children() -> list[str]:
    return Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()


def list_held() -> set[str]:
    """Open files and pipes of this process, its threads and the processes it started, by name."""
    handles = set()
    for number in os.listdir('/proc/self/fd'):
        with suppress(FileNotFoundError):  # closed since, that of the listing or by a thread
            handles.add(f'handle {number}: {os.readlink(f"/proc/self/fd/{number}")}')
    threads = {f'thread {number}' for number in os.listdir('/proc/self/task')}
    return handles | threads | {f'process {pid}' for pid in _list_children()}


def list_kept(held: list[set[str]]) -> set[str]:
    """What an epoch after the first made, and the next one still held."""
    kept = [made & later for made, later in pairwise(held[1:])]
    return set().union(*kept) - held[0]


@HOOKS.register_module()
class UsageHook(Hook):
    """Measure every so many steps; list what is held at the end of each epoch.

    How many that are says little: a queue of ended workers closes when its thread gets a turn, and
    garbage of others may go at any time. What is held by the same name an epoch later stays.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.usage: list[Usage] = []
        self.held: list[set[str]] = []

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        """Measure."""
        if (runner.iter + 1) % self.interval == 0:
            self.usage.append(measure(runner.iter + 1))

    def after_train_epoch(self, runner: Any) -> None:
        """List."""
        self.held.append(list_held())


def train_watched(folder: Path, epochs: int, length: int) -> tuple[CAERunner, UsageHook]:
    """Train so many epochs of so many steps, with a checkpoint and ten measurements in each."""
    make_images(folder / 'images', dict(all=256), length * BATCH)
    cfg = Config.fromfile(CONFIG)
    watch = dict(type='UsageHook', interval=length // 10)
    cfg.merge_from_dict(
        dict(
            work_dir=str(folder / 'run'),
            experiment_name=str(folder),  # mmengine keeps what has a name
            log_level='WARNING',
            optim_wrapper=dict(dtype='float32'),
            default_hooks=dict(checkpoint=dict(interval=1, max_keep_ckpts=KEPT)),
            auto_scale_lr=dict(base_batch_size=BATCH),
            train_dataloader=dict(num_workers=WORKERS),
            model=dict(
                backbone=dict(patch_size=8),
                neck=dict(WIDTHS, in_dims=16, regressor_depth=1, decoder_depth=1, out_dims=192),
            ),
        )
    )
    cfg.model.backbone.arch = dict(WIDTHS, depth=1, layer_scale=0.1)
    cfg.custom_hooks.append(watch)
    mask = dict(CAEMaskGenerator=dict(patch_size=8, min_block=2))
    images = dict(data_root=str(folder / 'images'), img_size=16, transforms=mask)
    cfg.settings = images | dict(epochs=epochs, batch_size=BATCH)
    runner = CAERunner.from_cfg(cfg)
    runner.train()
    [hook] = [hook for hook in runner.hooks if isinstance(hook, UsageHook)]
    return runner, hook
