"""When a run writes its checkpoints: by count, by the clock, and when it is told to end."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mmengine import hooks
from mmengine.dist import barrier, is_distributed, is_main_process
from mmengine.runner import Runner
from torch.distributed import ReduceOp

from cae_mm.checkpoints.whole import remove_unfinished
from cae_mm.registry import HOOKS

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Exit status of a run that was told to end and has saved: EX_TEMPFAIL of sysexits.h, "try again
# later". 128 + signal would be that of a run which was killed before it could save.
TRY_AGAIN = 75
BETWEEN = 2  # files between the regular ones that are kept, the older in case of damage


@HOOKS.register_module()
class CheckpointHook(hooks.CheckpointHook):
    """mmengine's, but a run that ends at any moment loses neither files nor gradients.

    - An old file is removed after the new one was written.
    - A file is written after an update only, when no gathered gradients wait for one.
    - ``minutes`` after the last file another is written, ``iter_N.pth``; the last two of these are
      kept until the training ends.
    - After SIGTERM or SIGUSR1 such a file is written at the next update, and the run ends with the
      status ``TRY_AGAIN``. Of several processes one needs to get the signal: at each update all
      learn what each wished at the one before, on the CPU, from messages that have come meanwhile.

    Args:
        minutes: None: only the regular files.
        options: Those of mmengine's ``CheckpointHook``.
    """

    def __init__(self, *, minutes: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.minutes = minutes
        self.late = False  # a regular file is due at the next update
        self.signal = 0  # that this process got
        self.handlers: dict[int, Any] = {}
        self.group: Any = None
        self.wishes: Any = None  # of all processes, on their way

    def before_train(self, runner: Runner) -> None:
        """Prepare folder and clock, and listen to signals."""
        super().before_train(runner)
        if is_main_process():
            remove_unfinished(Path(self.out_dir))
        self.outdated: list[str] = []
        self.remove = self.file_backend.remove
        self.file_backend.remove = self.outdated.append  # mmengine removes before it writes
        self.saved_at = time.monotonic()
        self.saved = False  # a regular file, in this run
        if is_distributed():
            self.group = torch.distributed.new_group(backend='gloo')
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._hear) for number in SIGNALS}

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.signal = number

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Save after an update, if it is time to."""
        last = self.is_last_train_iter(runner)
        if not self.by_epoch:
            self.late |= self.every_n_train_iters(runner, self.interval, self.save_begin)
            self.late |= self.save_last and last
        if not runner.optim_wrapper.should_update():
            return
        number, waited = self._agree(last)
        if self.late:
            runner.logger.info(f'Saving checkpoint at {runner.iter + 1} iterations')
            self._save_checkpoint(runner)
            self.late = False
        elif (number or waited) and not last:
            self._save_between(runner)
        if number and not last:
            self._end(runner, number)

    def _agree(self, last: bool) -> tuple[int, bool]:
        """Return the signal that some process got, and whether the main one waited long enough."""
        waited = (time.monotonic() - self.saved_at) / 60
        due = self.minutes is not None and waited >= self.minutes and is_main_process()
        wishes = torch.tensor([self.signal, due])
        if self.group is not None:
            before, self.wishes = self.wishes, None
            if due:
                self.saved_at = time.monotonic()  # said once
            if not last:
                work = torch.distributed.all_reduce(wishes, ReduceOp.MAX, self.group, async_op=True)
                self.wishes = wishes, work
            if before is None:
                return 0, False
            wishes, work = before
            work.wait()
        number, due = wishes.tolist()
        return number, bool(due)

    def _save_between(self, runner: Runner) -> None:
        """Save what is needed to go on from here."""
        step = runner.iter + 1
        steps = [*runner.message_hub.runtime_info.get('steps_between', []), step]
        runner.message_hub.update_info('steps_between', steps[-BETWEEN:])
        meta = dict(epoch=runner.epoch, iter=step)
        path = Path(self.out_dir, f'iter_{step}.pth')
        runner.logger.info(f'Saving checkpoint at {step} iterations, to go on from')
        runner.save_checkpoint(self.out_dir, path.name, meta=meta, backend_args=self.backend_args)
        self.saved_at = time.monotonic()
        if is_main_process():
            Path(runner.work_dir, 'last_checkpoint').write_text(str(path))
            self._remove_between(steps[:-BETWEEN])

    def _remove_between(self, steps: list[int]) -> None:
        for step in steps:
            Path(self.out_dir, f'iter_{step}.pth').unlink(missing_ok=True)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        """Save, and then remove what mmengine says."""
        super()._save_checkpoint_with_step(runner, step, meta)
        self.saved = True
        self.saved_at = time.monotonic()
        while self.outdated:
            self.remove(self.outdated.pop())

    def _end(self, runner: Runner, number: int) -> None:
        barrier()  # a launcher ends all processes when one of them ends
        for own in self.handlers:
            signal.signal(own, signal.SIG_IGN)  # whose signal would change this one's status
        name = signal.Signals(number).name
        runner.logger.warning(
            f'{name}: saved, ending with status {TRY_AGAIN}; --resume goes on from here'
        )
        raise SystemExit(TRY_AGAIN)

    def after_train(self, runner: Runner) -> None:
        """Remove what a finished training does not need."""
        super().after_train(runner)
        done = runner.iter >= runner.max_iters and self.saved and self.save_last
        if done and is_main_process():
            self._remove_between(runner.message_hub.runtime_info.get('steps_between', []))
        self.close()

    def close(self) -> None:
        """Listen to signals no longer."""
        while self.handlers:
            signal.signal(*self.handlers.popitem())
