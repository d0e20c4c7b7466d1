"""The list of images that a training could not read, and a limit to their number."""

from pathlib import Path
from typing import Any

from mmengine.dist import barrier, is_main_process, master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner

from cae_mm.datasets.unreadable import UnreadableList
from cae_mm.registry import HOOKS


@HOOKS.register_module()
class UnreadableImagesHook(Hook):
    """Write each image that was skipped into ``unreadable.txt`` of the work directory, once.

    Paths and reasons come with the batches (``LoadImage`` with ``on_error='skip'``), from all
    workers and processes, also of images that were drawn in their place. A run that is resumed
    goes on with its list. It needs a ``CAERunner``, whose loader reports them.

    Args:
        limit: Share of unreadable images, among those that a process tried, that ends the run.
        patience: Images that are tried before the share is looked at.
    """

    def __init__(self, limit: float = 0.1, patience: int = 1000) -> None:
        self.limit = limit
        self.patience = patience

    def before_train(self, runner: Runner) -> None:
        """Begin a list, or go on with that of the run that is resumed."""
        path = Path(runner.work_dir, 'unreadable.txt')
        if runner.iter == 0 and is_main_process():
            path.unlink(missing_ok=True)
        barrier()
        runner.train_dataloader.dataset.report_unreadable()
        self.list = UnreadableList(path)
        self.tried = self.skipped = 0

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict[str, Any], outputs: Any = None
    ) -> None:
        """Add what came with the batch."""
        samples = data_batch['data_samples']
        images = [image for sample in samples for image in sample.get('unreadable', ())]
        self.tried += len(samples) + len(images)
        if not images:
            return
        if not self.skipped:
            runner.logger.warning(
                f'{images[0].path} cannot be read ({images[0].reason}), another image is taken. '
                f'{self.list.path} gets all of this kind'
            )
        self.skipped += len(images)
        if any(image.path not in self.list.known for image in images):
            self.list.add(images)
        if self.tried > self.patience and self.skipped > self.limit * self.tried:
            raise OSError(
                f'{self.skipped} of {self.tried} images could not be read, more than '
                f'{self.limit:.0%}: {self.list.path} names them, with reasons. Mend the data, or '
                'set the limit of UnreadableImagesHook in custom_hooks'
            )

    @master_only
    def after_train_epoch(self, runner: Runner) -> None:
        """Say how many there are; nothing if there are none."""
        if self.list.path.exists():
            self.list.add()
            count = len(self.list.known)  # the logger shows the same line only once
            runner.logger.warning(
                f'epoch {runner.epoch + 1}: {count} images cannot be read, see {self.list.path}'
            )
