"""Hooks of each step: exact resuming, the d-VAE's temperature."""

import math
import random
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from cae_mm.hooks.checkpoint import unwrap
from cae_mm.registry import FUNCTIONS, HOOKS


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed all generators anew at each epoch from (seed, epoch, rank).

    So a run that was resumed at an epoch's beginning continues exactly as an uninterrupted one
    would. mmengine's own seeding of data workers restarts with the same augmentations after a
    resume, and in each epoch if workers do not persist; therefore the data loader needs
    ``worker_init_fn=dict(type='cae_mm.seeded_by_torch')`` and ``persistent_workers=False``.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Let gathering of gradients end with the epoch, so that no checkpoint loses some."""
        loop = runner._train_loop  # not built where a checkpoint is only judged
        if not isinstance(loop, EpochBasedTrainLoop):
            return
        wrapper: Any = runner.optim_wrapper
        wrapper.epoch_length = length = len(loop.dataloader)
        steps = getattr(wrapper, '_accumulative_counts', 1)
        if length < steps:
            runner.logger.warning(
                f'an epoch has {length} steps, so that gradients are gathered over {length}, not '
                f'over {steps} as the learning rate is for: lower it, or take more images'
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed Python, numpy and torch of this process; workers derive theirs from torch's."""
        entropy = [runner.seed % 2**32, runner.epoch, get_rank()]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


@FUNCTIONS.register_module()
def seeded_by_torch(worker_id: int) -> None:
    """Leave a data worker with the seeds that torch gave it.

    torch derives them (Python's and numpy's too) from the main process' generator whenever the
    loader is iterated anew. mmengine's default would overwrite them with constants.
    """


@HOOKS.register_module()
class GumbelTemperatureHook(Hook):
    """Anneal the temperature of a ``DiscreteVAE`` by a cosine over a share of the training.

    Args:
        start: Temperature at the first iteration.
        end: Temperature at and after the last iteration of the annealing; 1/16 in DALL-E
            (https://arxiv.org/abs/2102.12092, appendix A.2).
        share: Share of the iterations that the annealing takes.
    """

    def __init__(self, start: float = 1.0, end: float = 1 / 16, share: float = 0.75) -> None:
        self.start = start
        self.end = end
        self.share = share

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Set the model's temperature from the iteration's number."""
        progress = min(runner.iter / max(self.share * runner.max_iters, 1), 1.0)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        model: Any = unwrap(runner.model)
        model.temperature = self.end + (self.start - self.end) * cosine
