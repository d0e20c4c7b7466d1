"""What a training step takes on this machine: real steps by the config's own Runner."""

import resource
import time
from copy import deepcopy
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from torch.utils.data import DataLoader

from cae_mm.doctor.case import Case, quiet
from cae_mm.doctor.finding import type_name
from cae_mm.doctor.trial import find_steps, find_training_key

UNWANTED_HOOKS = ('KNNHook', 'PictureHook', 'ProgressHook')  # two need data, one talks
LOAD_SECONDS = 3.0  # for which images are loaded


@dataclass(frozen=True)
class Measurement:
    """Some steps of training on this machine, all processes together.

    Attributes:
        processes: That trained together.
        images: In a step of all of them.
        seconds: A step, with its share of an update.
        peak: Bytes: of the GPU's tensors where there is one, else of the resident process.
        on_gpu: Which of the two.
    """

    processes: int
    images: int
    seconds: float
    peak: int
    on_gpu: bool

    @property
    def rate(self) -> float:
        """Images a second of one process."""
        return self.images / self.seconds / self.processes


class StepTimer(Hook):
    """Takes the seconds of each step; the first ``gathered`` of them, which warm up, aside."""

    priority = 'VERY_LOW'  # behind all that other hooks do in a step

    def __init__(self, gathered: int) -> None:
        self.gathered = gathered
        self.ends: list[float] = []

    def after_train_iter(self, *_: Any, **__: Any) -> None:
        """Wait for the device and look at the clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self, recipe_gathered: int) -> float:
        """Median of a step in a recipe that updates once in so many of them."""
        ends, n = self.ends[self.gathered - 1 :], self.gathered
        spans = [after - before for before, after in zip(ends, ends[1:], strict=False)]
        with_update = median(spans[n - 1 :: n])
        without = median(spans[::n]) if n > 1 else 0.0
        return ((recipe_gathered - 1) * without + with_update) / recipe_gathered


def measure_steps(case: Case, data: Any, images: int, steps: int) -> Measurement:
    """Train some updates on the same batch again and again, so that data is not waited for.

    Args:
        case: The config; checkpoints that it names are left out.
        data: A collated batch.
        images: How many are in it.
        steps: Updates to take the time of; one more comes first.
    """
    gathered = case.get('optim_wrapper.accumulative_counts', 1)
    timer = StepTimer(min(gathered, 2))
    with TemporaryDirectory() as folder:
        cfg = make_short(case, folder, images, (steps + 1) * timer.gathered, timer.gathered)
        with quiet():
            runner: Any = RUNNERS.build(cfg)
            runner._train_dataloader = DataLoader(
                [data] * cfg.train_cfg.max_iters,  # type: ignore[arg-type]  # a list is a dataset
                collate_fn=_take_only,
                pin_memory=torch.cuda.is_available(),
            )
            runner.register_hook(timer)
            runner.train()
    processes, on_gpu = get_world_size(), torch.cuda.is_available()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Measurement(
        processes=processes,
        images=images * processes,
        seconds=timer.seconds(gathered),
        peak=torch.cuda.max_memory_allocated() if on_gpu else resident,
        on_gpu=on_gpu,
    )


def make_short(case: Case, folder: str, images: int, steps: int, gathered: int) -> Config:
    """The config for a few steps with random weights, without data, evaluation and files."""
    changes: dict[str, Any] = dict(
        work_dir=folder,
        log_level='ERROR',
        load_from=None,
        resume=False,
        param_scheduler=None,
        visualizer=None,  # no experiment on a server, as backends of the config make
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=steps, val_interval=steps + 1),
        train_dataloader=dict(batch_size=images, num_workers=0, dataset=dict()),
    )
    for name in ('val', 'test'):
        changes |= {f'{name}_{part}': None for part in ('cfg', 'dataloader', 'evaluator')}
    hooks: Any = dict(case.get('default_hooks') or {}, checkpoint=None)
    changes['default_hooks'] = {k: v for k, v in hooks.items() if k != 'visualization'}
    hooks = case.get('custom_hooks') or []
    changes['custom_hooks'] = [h for h in hooks if type_name(h) not in UNWANTED_HOOKS]
    cfg = Config(deepcopy(case.cfg.to_dict() | changes))
    cfg.optim_wrapper.accumulative_counts = gathered
    forget_weights(cfg.model)
    return cfg


def measure_loading(case: Case, dataset: Any) -> float:
    """Images a second that one worker loads and transforms, of the images that are here."""
    load = Compose(find_steps(case, find_training_key(case) or ''))
    count, start = 0, time.perf_counter()
    for i in cycle(range(len(dataset))):
        count += load(dataset.get_data_info(i)) is not None
        seconds = time.perf_counter() - start
        if seconds > LOAD_SECONDS:
            break
    return count / seconds


def _take_only(batches: list[Any]) -> Any:
    return batches[0]


def forget_weights(node: Any) -> None:
    """Remove what would load weights, everywhere in the config of a model."""
    if isinstance(node, dict):
        if type_name(node.get('init_cfg')) == 'Pretrained':
            del node['init_cfg']
        for value in node.values():
            forget_weights(value)
    elif isinstance(node, list | tuple):
        for value in node:
            forget_weights(value)
