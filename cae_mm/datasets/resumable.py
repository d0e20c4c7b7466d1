"""Loading that goes on at any batch of a training, with the random numbers of that batch."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from mmengine.dist import get_rank
from torch.utils.data import DataLoader, IterableDataset, Sampler

from cae_mm.datasets.unreadable import collecting_unreadable
from cae_mm.seeds import DATA, seed_everything_for

ORPHANED_AFTER = 5  # seconds in which a worker sees that its process is gone
# what a loader is made of beside data and order
OPTIONS = (
    'num_workers',
    'collate_fn',
    'pin_memory',
    'timeout',
    'worker_init_fn',
    'multiprocessing_context',
    'generator',
    'prefetch_factor',
    'persistent_workers',
)


class Batch(list[int]):
    """Indices of a batch, with seed and place of its random numbers."""

    seed: tuple[int, ...]


class SeededDataset:
    """Draws the random numbers of a batch from the batch's own seed; else the dataset it wraps.

    So data depends neither on the number of workers nor on what they read before.
    """

    def __init__(self, dataset: Any) -> None:
        self.__dict__.update(dataset=dataset, reports=False)

    def report_unreadable(self) -> None:
        """Let the first sample of a batch say which images were skipped; else the log does."""
        self.__dict__['reports'] = True

    def __getitems__(self, batch: Batch) -> list[Any]:
        """Read a batch; torch's loaders prefer this to single items."""
        seed_everything_for(*batch.seed)
        if not self.reports:
            return [self.dataset[index] for index in batch]
        with collecting_unreadable() as found:
            samples = [self.dataset[index] for index in batch]
        if found:
            samples[0]['data_samples'].set_metainfo(dict(unreadable=found))
        return samples

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # not there yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)  # hooks exchange pipelines


class ResumableBatchSampler(Sampler[Batch]):
    """Batches of any batch sampler, numbered by the iteration that gets them.

    Args:
        batches: Batch sampler of this process, finite or not.
        seed: Seed of the run.
    """

    def __init__(self, batches: Any, seed: int) -> None:
        self.batches = batches
        self.seed = seed
        self.iteration = 0  # of the next batch
        self.rest: Iterator[list[int]] | None = None

    @property
    def sampler(self) -> Any:
        """The sampler of single images, which hooks tell the epoch."""
        return self.batches.sampler

    def skip(self, count: int) -> int:
        """Begin the next pass after its first ``count`` batches, of which only indices are drawn.

        Returns:
            How many of them the pass does not have.
        """
        self.rest = iter(self.batches)
        return count - sum(1 for _ in islice(self.rest, count))

    def __iter__(self) -> Iterator[Batch]:
        rest, self.rest = self.rest or iter(self.batches), None
        for indices in rest:
            batch = Batch(indices)
            batch.seed = (self.seed, DATA, self.iteration, get_rank())
            self.iteration += 1
            yield batch

    def __len__(self) -> int:
        return len(self.batches)


class ResumableLoader(DataLoader):
    """A loader like another one, except that it goes on at any batch.

    Args:
        loader: A loader of a dataset with indices; not iterated yet.
        seed: Seed of the run.
    """

    batch_sampler: ResumableBatchSampler

    def __init__(self, loader: DataLoader, seed: int) -> None:
        if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
            raise ValueError(
                f'{type(loader.dataset).__name__} is read without indices of batches, so a run '
                'cannot go on where it was: give train_dataloader a batch_size and a dataset with '
                'indices'
            )
        super().__init__(
            SeededDataset(loader.dataset),  # type: ignore[arg-type]  # has what a dataset has
            batch_sampler=ResumableBatchSampler(loader.batch_sampler, seed),  # type: ignore[arg-type]
            **{name: getattr(loader, name) for name in OPTIONS},
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()  # workers start with the first batch, not before

    def epoch_from(self, iteration: int, batch: int) -> Iterator[Any]:
        """The batches of an epoch from number ``batch`` on, which is the one of ``iteration``."""
        self.batch_sampler.iteration = iteration
        self.batch_sampler.skip(batch)
        return iter(self)

    def endless_from(self, iteration: int) -> Iterator[Any]:
        """Batches of the steps from ``iteration`` on; a sampler that ends begins another epoch."""
        sampler, epoch = self.batch_sampler, 0
        sampler.iteration, missing = iteration, iteration
        while True:
            missing = sampler.skip(missing)
            if not missing:
                yield from self
            epoch += 1
            if hasattr(sampler.sampler, 'set_epoch'):
                sampler.sampler.set_epoch(epoch)


def start_worker(prepare: Callable[[int], None] | None, worker_id: int) -> None:
    """Start a data worker that ends by signal only when its own process asks for that.

    Schedulers and torchrun send SIGTERM to all processes of a run. A worker that ends would take
    the run with it, which still wants batches up to the next update, and then to save. It ends
    with that process too, even if it has batches to send (for which torch would wait).
    """
    if prepare is not None:
        prepare(worker_id)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for_parent, args=(os.getppid(),), daemon=True).start()


def _end_for_parent(parent: int) -> None:
    told = None
    while os.getppid() == parent and (told is None or told.si_pid != parent):
        told = signal.sigtimedwait({signal.SIGTERM}, ORPHANED_AFTER)
    os._exit(0)
