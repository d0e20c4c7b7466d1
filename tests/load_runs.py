"""A tiny pretraining with all default hooks and data workers, whose resources are watched."""

import os
import time
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
    handles: int
    threads: int


def measure(step: int) -> Usage:
    """Ask the kernel."""
    own = os.getpid()
    children = Path(f'/proc/{own}/task/{own}/children').read_text().split()
    status = [_read_status(pid) for pid in (own, *children)]
    memory = [int(each['VmRSS'].split()[0]) * 1024 for each in status]
    return Usage(
        step,
        time.monotonic(),
        time.process_time(),
        memory[0],
        sum(memory[1:]),
        sum(len(os.listdir(f'/proc/{pid}/fd')) for pid in (own, *children)),
        sum(int(each['Threads']) for each in status),
    )


def _read_status(pid: int | str) -> dict[str, str]:
    lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    return dict(line.split(':', 1) for line in lines)


@HOOKS.register_module()
class UsageHook(Hook):
    """Measure every so many steps."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.usage: list[Usage] = []

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        """Note it."""
        if (runner.iter + 1) % self.interval == 0:
            self.usage.append(measure(runner.iter + 1))


def train_watched(folder: Path, epochs: int, length: int) -> tuple[CAERunner, list[Usage]]:
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
    return runner, hook.usage
