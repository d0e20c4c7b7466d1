"""Progress of a training: a bar with ETA from the first step on, and images/s."""

import sys
import time
from contextlib import ExitStack
from typing import Any

from mmengine.dist import get_world_size, master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cae_mm.registry import HOOKS

SECONDS = 0.5  # between two looks of the bar in a terminal
SECONDS_IN_FILE = 10.0  # between two lines where the output goes to a file


@HOOKS.register_module()
class ProgressHook(Hook):
    """Show one bar for the whole training on stderr, and log ``images_per_s`` of all processes."""

    priority = 'LOW'  # after the step's numbers are logged
    stack: ExitStack | None = None

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Open the bar, at the place where a resumed run goes on."""
        in_terminal = sys.stderr.isatty()
        self.seconds = SECONDS if in_terminal else SECONDS_IN_FILE
        self.stack = ExitStack()
        if in_terminal:  # log lines go above the bar
            self.stack.enter_context(logging_redirect_tqdm([runner.logger]))
        self.bar = self.stack.enter_context(
            tqdm(
                desc=runner.model_name,
                total=runner.max_iters,
                initial=runner.iter,
                unit=' steps',
                mininterval=0,  # when it is painted is said below
                miniters=1,
                dynamic_ncols=in_terminal,
            )
        )
        self.due = time.monotonic()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict[str, Any], outputs: Any = None
    ) -> None:
        """Move the bar; the time of the step is that which ``IterTimerHook`` took."""
        images = len(data_batch['data_samples']) * get_world_size()
        speed = images / runner.message_hub.get_scalar('train/time').current()
        runner.message_hub.update_scalar('train/images_per_s', speed)
        self._move_bar(runner)

    @master_only
    def _move_bar(self, runner: Runner) -> None:
        if time.monotonic() >= self.due:
            self._paint(runner, runner.iter + 1)
            self.due = time.monotonic() + self.seconds

    def _paint(self, runner: Runner, steps: int) -> None:
        """Paint the bar after so many steps; only then the loss is read from the device."""
        logged = runner.message_hub.log_scalars
        loss, speed = logged['train/loss'].mean(50), logged['train/images_per_s'].mean(50)
        self.bar.set_postfix_str(f'loss {loss:.3g}, {speed:.3g} images/s', refresh=False)
        self.bar.update(steps - self.bar.n)

    @master_only
    def after_train(self, runner: Runner) -> None:
        """Leave the full bar on the screen."""
        if self.bar.n < runner.iter:
            self._paint(runner, runner.iter)
        self.close()

    @master_only
    def close(self) -> None:
        """Let go of the bar and of the log."""
        if self.stack:
            self.stack.close()
