"""A guard against numbers that are not finite: it records, limits and may go back."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.dist import (
    all_reduce,
    get_rank,
    get_world_size,
    is_main_process,
)
from mmengine.hooks import CheckpointHook, EMAHook, Hook, LoggerHook
from mmengine.runner import Runner
from torch import Tensor

from cae_mm.checkpoints.files import read_checkpoint, write_safetensors
from cae_mm.checkpoints.whole import find_last_whole
from cae_mm.engine.faults import Batch, Fault
from cae_mm.engine.message_hub import read_scalars
from cae_mm.engine.mixed_precision import MixedPrecisionOptimWrapper
from cae_mm.engine.processes import on_main_process, unwrap
from cae_mm.engine.sharding import gathered_state, is_sharded, shard_optimizer_state
from cae_mm.registry import HOOKS


class Step(NamedTuple):
    """What is remembered of a step until its numbers are read."""

    batch: Batch
    losses: dict[str, Tensor]
    grad_norm: Tensor | None  # None where the step was no update


@HOOKS.register_module()
class NumericalFaultHook(Hook):
    """Record steps whose loss or gradients are not finite, and stop a run that has too many.

    ``MixedPrecisionOptimWrapper`` skips their updates (with another wrapper the first such step
    ends the run). Each is logged, and written to ``faults`` in the work directory, so that
    ``tools/replay.py`` can repeat it. Overflowing gradients of float16 are no faults: loss scaling
    expects them; losses are judged with it too.

    On a CPU numbers are looked at in each step. On other devices they are read when a line is
    logged, an epoch ends or a checkpoint is due, so that no step waits: the weights in ``faults``
    are then of up to one logging interval later. All processes look in the same steps and decide
    alike.

    Args:
        limit: Faults within ``window`` steps that are survived; the next one ends the run. 10 are
            1 % of the images: more are no longer some odd ones, but a run that diverges.
        window: Steps.
        max_dumps: Faults that are written to files.
        rollbacks: How often the run, instead of ending, takes weights and states of the optimizer
            from its last checkpoint; iterations, schedules and data go on.
    """

    def __init__(
        self, limit: int = 10, window: int = 1000, max_dumps: int = 3, rollbacks: int = 0
    ) -> None:
        self.limit = limit
        self.window = window
        self.max_dumps = max_dumps
        self.rollbacks = rollbacks
        self.steps: list[Step] = []
        self.gathered: list[Batch] = []  # read already, since the last update
        self.update_is_lost = False  # by the loss of one of them
        self.recent: list[int] = []  # iterations of faults within the window

    def before_run(self, runner: Runner) -> None:
        """Refuse what cannot be rolled back."""
        if self.rollbacks and any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ValueError(
                'NumericalFaultHook.rollbacks and EMAHook: going back would mix weights and their '
                'averages, choose one of the two'
            )

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict[str, Any], outputs: Any = None
    ) -> None:
        """Remember the step; look at all that are remembered where all processes do."""
        wrapper: Any = runner.optim_wrapper
        scaler = getattr(wrapper, 'loss_scaler', None)
        unknown = torch.zeros(())
        norm = getattr(wrapper, 'grad_norm', unknown)
        if norm is not None and scaler and scaler.is_enabled():
            norm = unknown
        images = [sample.get('img_path', 'unknown') for sample in data_batch['data_samples']]
        losses = {name: x.detach() for name, x in outputs.items() if isinstance(x, Tensor)}
        batch = Batch(runner.iter, runner.epoch, batch_idx, images)
        self.steps.append(Step(batch, losses, norm))
        if reads_at_once(losses['loss']) or self._is_due(runner, batch_idx):
            self._look(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Let no file have broken weights, however they came about."""
        state = {k: v for k, v in checkpoint['state_dict'].items() if v.is_floating_point()}
        finite = read_scalars([x.isfinite().all() for x in state.values()])
        broken = [name for name, is_finite in zip(state, finite, strict=True) if not is_finite]
        if broken:
            raise FloatingPointError(
                f'{len(broken)} tensors of the model are not finite after iteration {runner.iter}, '
                f'{broken[0]} the first: no checkpoint is written. {way_out(runner)}'
            )

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

    def _look(self, runner: Runner) -> None:
        """Judge the steps since the last look."""
        steps, self.steps = self.steps, []
        faults = self._find_faults(runner, steps)
        if not faults:
            return
        skips = isinstance(runner.optim_wrapper, MixedPrecisionOptimWrapper)
        for fault in faults:
            images = [path for batch in fault.batches for path in batch.images]
            runner.logger.warning(
                f'{fault}: {"the update is skipped; " if skips else ""}'
                f'images of this process: {images}'
            )
        self._dump(runner, faults)
        self.recent += [fault.iteration for fault in faults]
        self.recent = [i for i in self.recent if i > runner.iter + 1 - self.window]
        if len(self.recent) > (self.limit if skips else 0):
            self._go_back(runner, faults[-1])

    def _find_faults(self, runner: Runner, steps: list[Step]) -> list[Fault]:
        norms = [step.grad_norm for step in steps if step.grad_norm is not None]
        numbers = read_scalars([*(step.losses['loss'] for step in steps), *norms])
        losses, norms_read = numbers[: len(steps)], iter(numbers[len(steps) :])
        broken = torch.tensor([not math.isfinite(x) for x in losses], dtype=torch.uint8)
        all_reduce(broken, 'max')  # of any process
        faults = []
        for step, loss, is_broken in zip(steps, losses, broken.tolist(), strict=True):
            norm = 0.0 if step.grad_norm is None else next(norms_read)
            self.gathered.append(step.batch)
            if is_broken:
                self.update_is_lost = True
                here = f'the loss is {loss}'
                reason = "another process' loss is not finite" if math.isfinite(loss) else here
                faults.append(self._describe(runner, reason, step, [step.batch]))
            elif not (math.isfinite(norm) or self.update_is_lost):
                reason = f'the norm of the gradients is {norm}'
                faults.append(self._describe(runner, reason, step, self.gathered))
            if step.grad_norm is not None:
                self.gathered, self.update_is_lost = [], False
        return faults

    def _describe(self, runner: Runner, reason: str, step: Step, batches: list[Batch]) -> Fault:
        precision = getattr(runner.optim_wrapper, 'precision', None)
        return Fault(
            reason=reason,
            losses=dict(zip(step.losses, read_scalars([*step.losses.values()]), strict=True)),
            batches=batches,
            seed=runner.seed,
            rank=get_rank(),
            world_size=get_world_size(),
            precision=str(precision.dtype).removeprefix('torch.') if precision else 'float32',
            config=f'config_{runner.timestamp}.txt',
            weights=f'weights_{runner.iter + 1}.safetensors',
        )

    def _dump(self, runner: Runner, faults: list[Fault]) -> None:
        """Write the first faults of a run; each process its own, one of them config and weights."""
        faults = faults[: self.max_dumps]
        self.max_dumps -= len(faults)
        if not faults:
            return
        folder = Path(runner.work_dir, 'faults')
        folder.mkdir(parents=True, exist_ok=True)
        for fault in faults:
            fault.write(folder)
        optimizer = runner.optim_wrapper.optimizer
        sharded = is_sharded(runner.model)
        with gathered_state(runner.model, optimizer) if sharded else nullcontext():
            state = unwrap(runner.model).state_dict()
        if is_main_process():
            write_safetensors(
                folder / faults[0].weights, {k: v.to('cpu', copy=True) for k, v in state.items()}
            )
            config = repr(runner.cfg.to_dict())
            (folder / faults[0].config).write_text(config + '\n', encoding='utf-8')
        name = folder / faults[0].file_name
        runner.logger.warning(f'`python tools/replay.py {name}` repeats such a step')

    def _go_back(self, runner: Runner, last: Fault) -> None:
        """Take the last checkpoint's weights and states, or end the run."""
        reason = (
            f'{len(self.recent)} faults within {self.window} steps, more than {self.limit}; '
            f'the last: {last}'
        )
        folder, warn = Path(runner.work_dir), runner.logger.warning
        path = on_main_process(find_last_whole, folder, warn) if self.rollbacks else None
        if path is None:
            images = last.batches[-1].images
            raise FloatingPointError(
                f'{reason}; images of this process: {images}. {way_out(runner)}'
            )
        self.rollbacks -= 1
        self.recent = []
        content = read_checkpoint(path).content
        unwrap(runner.model).load_state_dict(content['state_dict'])
        optimizer = runner.optim_wrapper.optimizer
        if is_sharded(runner.model):
            shard_optimizer_state(optimizer)
        # learning rates stay those of the schedule
        optimizer.load_state_dict(optimizer.state_dict() | {'state': content['optimizer']['state']})
        runner.logger.warning(f'{reason}. Weights and optimizer go back to {path}')


def way_out(runner: Runner) -> str:
    """What can be done about faults."""
    return (
        f'Repeat a step of {runner.work_dir}/faults with tools/replay.py to see where it breaks; '
        'leave out images that break it, or resume from the last checkpoint with a lower learning '
        'rate, or in bfloat16 or float32 rather than float16'
    )


def reads_at_once(x: Tensor) -> bool:
    """Whether reading a number makes no step wait."""
    return x.device.type == 'cpu'
