"""The d-VAE's temperature."""

import math
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from cae_mm.hooks.checkpoint import unwrap
from cae_mm.registry import HOOKS


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
