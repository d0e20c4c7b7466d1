"""Say in plain words when the numbers of the log mean that nothing is learned any more."""

import math
from typing import Any, NamedTuple

from mmengine.dist import master_only
from mmengine.hooks import Hook, LoggerHook
from mmengine.runner import Runner

from cae_mm.registry import HOOKS


class Sign(NamedTuple):
    """A number that tells of collapse when it is too low."""

    name: str
    lowest: float
    meaning: str
    advice: str


SIGNS = (
    # latents are layer-normalised: their values vary by about 1. Here images make up less than
    # 0.02 ** 2 = 0.04 % of that variance; healthy runs have 0.1 and more
    Sign(
        'latent_std',
        0.02,
        'the latents of masked patches hardly differ between images, so the encoder is learning '
        'to give the same for all of them (collapse)',
        'resume from an earlier checkpoint with a lower learning rate or a longer warm-up',
    ),
    # 0 is what unrelated latents have
    Sign(
        'align_cos',
        0.05,
        'the latents that are predicted have nothing in common with those that the encoder gives '
        'to the masked patches, so the regressor is not learning',
        'see whether loss_align falls at all; lower the learning rate, or raise head.align_weight',
    ),
    # 16 tokens are at most 4 bits of a patch
    Sign(
        'target_codes',
        16,
        'the tokenizer gives so few different tokens to this batch that there is little to predict',
        'look whether the tokenizer is trained, and on images like these; paint its tokens with '
        'tools/picture.py reconstruct',
    ),
    Sign(
        'perplexity',
        16,
        'the d-VAE uses so few of its tokens that they say little of an image (codebook collapse)',
        'raise model.usage_weight, or lower the learning rate',
    ),
)


@HOOKS.register_module()
class CollapseHook(Hook):
    """Warn when a line is logged whose numbers are signs of collapse, and when they are gone.

    Each state is told once. The numbers are those that the model logs anyway, means of the last
    ten steps, read when they are written.

    Args:
        begin: Share of the training before which nothing is judged: in the beginning all latents
            are alike and a d-VAE uses few tokens, in healthy runs too.
        lines: Logged lines in a row that show a sign before it is told.
    """

    priority = 'LOW'  # after the step's numbers are logged

    def __init__(self, begin: float = 0.1, lines: int = 3) -> None:
        self.begin = begin
        self.lines = lines
        self.seen = {sign.name: 0 for sign in SIGNS}  # in so many lines in a row

    @master_only
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict[str, Any], outputs: Any = None
    ) -> None:
        """Judge the numbers when a line is logged."""
        loggers = [hook for hook in runner.hooks if isinstance(hook, LoggerHook)]
        due = any(hook.every_n_inner_iters(batch_idx, hook.interval) for hook in loggers)
        if not due or runner.iter < self.begin * runner.max_iters:
            return
        for sign in SIGNS:
            alone = sign.name == 'latent_std' and len(data_batch['data_samples']) < 2
            if sign.name in outputs and not alone:
                number = runner.message_hub.get_scalar(f'train/{sign.name}').mean(10)
                self._judge(runner, sign, number)

    def _judge(self, runner: Runner, sign: Sign, number: float) -> None:
        if not math.isfinite(number):
            return  # a matter of ``NumericalFaultHook``
        before = self.seen[sign.name]
        self.seen[sign.name] = before + 1 if number < sign.lowest else 0
        if self.seen[sign.name] == self.lines:
            runner.logger.warning(
                f'{sign.name} is {number:.3g}, below {sign.lowest}: {sign.meaning}. What to do: '
                f'{sign.advice}'
            )
        elif before >= self.lines and not self.seen[sign.name]:
            runner.logger.info(f'{sign.name} is {number:.3g}, above {sign.lowest} again')
