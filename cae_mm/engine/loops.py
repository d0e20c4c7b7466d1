"""mmengine's loops of training, except that they go on in the middle of an epoch."""

from itertools import islice
from typing import Any

from mmengine.dist import get_rank
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from cae_mm.datasets.resumable import ResumableLoader
from cae_mm.seeds import STEP, seed_everything_for


def seed_step(runner: Runner) -> None:
    """Draw a step's random numbers from (seed, iteration, rank), whatever happened before."""
    seed_everything_for(runner.seed, STEP, runner.iter, get_rank())


def make_resumable(runner: Runner, dataloader: Any) -> ResumableLoader:
    """Build the loader of a training, as ``BaseLoop`` does."""
    if isinstance(dataloader, dict):
        different = runner._randomness_cfg.get('diff_rank_seed', False)
        dataloader = runner.build_dataloader(dataloader, runner.seed, different)
    return ResumableLoader(dataloader, runner.seed)


class ResumableEpochLoop(EpochBasedTrainLoop):
    """Goes on after the last batch that a checkpoint counts, and seeds each step."""

    dataloader: ResumableLoader

    def __init__(self, runner: Runner, dataloader: Any, **options: Any) -> None:
        super().__init__(runner, make_resumable(runner, dataloader), **options)

    def run_epoch(self) -> None:
        """Train on what is left of the epoch, which is nothing where its end is to be judged."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        done = self._iter - self._epoch * len(self.dataloader)
        for batch_idx, data in enumerate(self.dataloader.epoch_from(self._iter, done), start=done):
            self.run_iter(batch_idx, data)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Train a step."""
        seed_step(self.runner)
        super().run_iter(idx, data_batch)


class ResumableIterLoop(IterBasedTrainLoop):
    """Goes on after the last batch that a checkpoint counts, and seeds each step."""

    dataloader: ResumableLoader

    def __init__(self, runner: Runner, dataloader: Any, **options: Any) -> None:
        super().__init__(runner, make_resumable(runner, dataloader), **options)

    def run(self) -> Any:
        """Train to the last iteration; to hooks all of it is one epoch."""
        runner = self.runner
        runner.call_hook('before_train')
        runner.call_hook('before_train_epoch')
        missing = max(self._max_iters - self._iter, 0)
        for data in islice(self.dataloader.endless_from(self._iter), missing):
            runner.model.train()
            self.run_iter(data)
            self._decide_current_val_interval()
            due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
            if runner.val_loop is not None and self._iter >= self.val_begin and due:
                runner.val_loop.run()
            if self.stop_training:
                break
        runner.call_hook('after_train_epoch')
        runner.call_hook('after_train')
        return runner.model

    def run_iter(self, data_batch: Any) -> None:
        """Train a step."""
        seed_step(self.runner)
        super().run_iter(data_batch)
