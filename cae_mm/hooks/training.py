"""Hooks of each step: exact resuming, a guard against broken losses, the d-VAE's temperature."""

import math
import random
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor

from cae_mm.engine.message_hub import read_scalars
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


class Step(NamedTuple):
    """What is remembered of a step until its numbers are read."""

    iteration: int
    epoch: int
    paths: list[str]
    loss: Tensor
    grad_norm: Tensor | None


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Stop at a loss that is not finite and say which images were in its batch.

    The norm of the gradients, if ``MixedPrecisionOptimWrapper`` clips them, is looked at too: it is
    the same on all processes, so that all stop when one has a broken loss. Not with loss scaling,
    which expects gradients that overflow.

    Both stay on the device until a line is logged, an epoch ends or a checkpoint is due, so that
    no step waits. The steps since the broken one are lost, but no checkpoint has their weights.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict[str, Any], outputs: Any = None
    ) -> None:
        """Remember the step; look at all that are remembered where all processes do."""
        wrapper = runner.optim_wrapper
        scaler = getattr(wrapper, 'loss_scaler', None)
        norm = None if scaler and scaler.is_enabled() else getattr(wrapper, 'grad_norm', None)
        paths = [sample.get('img_path', 'unknown') for sample in data_batch['data_samples']]
        loss = outputs['loss'].detach()
        self.steps.append(Step(runner.iter + 1, runner.epoch + 1, paths, loss, norm))
        if self._is_due(runner, batch_idx):
            self._check()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Let no hook write broken weights, whenever it does."""
        self._check()

    def _is_due(self, runner: Runner, batch_idx: int) -> bool:
        """Whether all processes log a line now, or may write a checkpoint."""
        for hook in runner.hooks:
            if isinstance(hook, LoggerHook):
                due = hook.every_n_inner_iters(batch_idx, hook.interval)
            elif isinstance(hook, CheckpointHook) and not hook.by_epoch:
                due = hook.every_n_train_iters(runner, hook.interval)
            else:
                continue
            if due:
                return True
        ends = self.end_of_epoch(runner.train_dataloader, batch_idx)
        return ends or self.is_last_train_iter(runner)

    def _check(self) -> None:
        steps, self.steps = self.steps, []
        numbers = iter(read_scalars([x for step in steps for x in step[-2:] if x is not None]))
        for step in steps:
            values = {'the loss': next(numbers)}
            if step.grad_norm is not None:
                values['the norm of the gradients'] = next(numbers)
            broken = [f'{name} is {x}' for name, x in values.items() if not math.isfinite(x)]
            if broken:
                raise FloatingPointError(
                    f'{" and ".join(broken)} at iteration {step.iteration} (epoch {step.epoch}); '
                    f'images of the batch on this process: {step.paths}. Resume from the last '
                    'checkpoint with a lower learning rate, or train in bfloat16 or float32 '
                    'rather than float16'
                )


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
