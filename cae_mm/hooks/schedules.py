"""Numbers of a model that follow a schedule: the d-VAE's temperature, the alignment's weight."""

import math
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from cae_mm.engine.processes import unwrap
from cae_mm.registry import HOOKS


class ScheduleHook(Hook):
    """Sets a number of the model in each iteration, from nothing but the iteration's number.

    So a resumed run goes on with the same numbers.

    Args:
        share: Share of the iterations that the schedule takes.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Set the number."""
        progress = min(runner.iter / max(self.share * runner.max_iters, 1), 1.0)
        self.set_number(unwrap(runner.model), progress)

    def set_number(self, model: Any, progress: float) -> None:
        """Set the number at ``progress``, 0 at the first iteration, 1 at the schedule's end."""
        raise NotImplementedError


@HOOKS.register_module()
class GumbelTemperatureHook(ScheduleHook):
    """Anneal the temperature of a ``DiscreteVAE`` by a cosine over a share of the training.

    Args:
        start: Temperature at the first iteration.
        end: Temperature at and after the last iteration of the annealing; 1/16 in DALL-E
            (https://arxiv.org/abs/2102.12092, appendix A.2).
        share: Share of the iterations that the annealing takes.
    """

    def __init__(self, start: float = 1.0, end: float = 1 / 16, share: float = 0.75) -> None:
        super().__init__(share)
        self.start = start
        self.end = end

    def set_number(self, model: Any, progress: float) -> None:
        """Set the model's temperature."""
        cosine = (1 + math.cos(math.pi * progress)) / 2
        model.temperature = self.end + (self.start - self.end) * cosine


@HOOKS.register_module()
class AlignmentRampHook(ScheduleHook):
    """Let the weight of CAE's alignment grow linearly from 0 to lambda; the paper does not.

    Args:
        share: Share of the iterations after which the weight is ``head.align_weight``.
    """

    def __init__(self, share: float = 0.1) -> None:
        super().__init__(share)

    def before_train(self, runner: Runner) -> None:
        """Refuse models that have no alignment."""
        head = getattr(unwrap(runner.model), 'head', None)
        if not getattr(head, 'align_weight', 0):
            raise ValueError(
                'AlignmentRampHook found no alignment loss: it is for cae_mm.CAE, with a '
                'head.align_weight that is not 0; leave it out of custom_hooks'
            )

    def set_number(self, model: Any, progress: float) -> None:
        """Set the factor of the alignment loss, on its device and without waiting for it."""
        model.head.align_ramp.fill_(progress)
