"""Resume with another number of steps in an epoch or an update: more processes, another batch."""

import warnings
from collections.abc import Callable
from typing import Any

from mmengine.runner import EpochBasedTrainLoop, Runner


def count_steps(runner: Runner) -> dict[str, int]:
    """What a checkpoint says of the steps that it counts: those of an epoch and of an update."""
    loader: Any = runner.train_dataloader
    gathered = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
    return dict(epoch_length=len(loader), gathered=gathered)


def recount(runner: Runner, meta: dict[str, Any], warn: Callable[[str], None]) -> bool:
    """Count in ``meta['iter']`` the steps that this run takes for what the file's run has done.

    Epochs count where a run counts epochs: one that was begun begins again. Updates count where it
    counts iterations.

    Returns:
        Whether its schedules, which count steps, have to begin anew as well.
    """
    by_epoch = isinstance(runner._train_loop, EpochBasedTrainLoop)
    key, what = ('epoch_length', 'an epoch') if by_epoch else ('gathered', 'an update')
    before, now, done = meta.get(key), count_steps(runner)[key], meta['iter']
    if before == now:
        return False
    if by_epoch:
        meta['iter'] = meta['epoch'] * now
    elif before is not None:
        meta['iter'] = done // before * now
    if before is None and meta['iter'] == done:  # a file of mmengine's
        return False
    text = f'goes on from step {meta["iter"]}'
    if by_epoch and (before is None or done != meta['epoch'] * before):
        text = f'begins epoch {meta["epoch"] + 1} again'
    warn(
        f'the checkpoint is of a run with {before or "?"} batches {what}, this one has {now}: '
        f'it {text}'
    )
    return True


def repeat_schedules(runner: Runner) -> None:
    """Begin the schedules anew and take them to where the run is."""
    wrapper: Any = runner.optim_wrapper
    for group in wrapper.param_groups:
        for key in [key for key in group if key.startswith('initial_')]:
            group[key.removeprefix('initial_')] = group[key]
    runner.param_schedulers = runner.build_param_scheduler(runner.cfg.param_scheduler)
    by_epoch = isinstance(runner._train_loop, EpochBasedTrainLoop)
    length = len(runner.train_dataloader)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Detected call of `scheduler.step')
        for step in range(1, runner.iter + 1):
            for scheduler in runner.param_schedulers:  # type: ignore[union-attr]
                if not scheduler.by_epoch or (by_epoch and step % length == 0):
                    scheduler.step()
