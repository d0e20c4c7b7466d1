"""Batches of a training, from any of them on, with random numbers of their own."""

import os
import pickle
import random
import time
from functools import partial
from importlib.util import find_spec
from itertools import islice

import interrupted
import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from cae_mm.datasets import resumable
from cae_mm.datasets.resumable import ResumableLoader, SeededDataset, start_worker
from cae_mm.seeds import DATA, STEP, seed_everything_for


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


class Draws:
    """Ten images, of which three numbers are drawn."""

    metainfo = dict(classes=('ant',))
    pipeline = 'first'

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index, *draw()

    def get_data_info(self, index):
        return dict(width=index % 3, height=1)


class Large(Draws):
    """More than a pipe takes."""

    def __getitem__(self, index):
        return bytes(2**20)


def make(kind, workers=0, seed=5):
    data = Draws()
    options = dict(num_workers=workers, collate_fn=list, worker_init_fn=partial(start_worker, None))
    infinite = InfiniteSampler(data, seed=7)
    if kind == 'infinite':
        loader = DataLoader(data, 3, sampler=infinite, **options)
    elif kind == 'by aspect':
        from mmdet.datasets.samplers import AspectRatioBatchSampler

        loader = DataLoader(data, batch_sampler=AspectRatioBatchSampler(infinite, 3), **options)
    else:
        loader = DataLoader(
            data, 3, sampler=DefaultSampler(data, seed=7), drop_last=True, **options
        )
    return ResumableLoader(loader, seed)


def take(loader, start, count):
    return list(islice(loader.endless_from(start), count))


def test_random_numbers_are_a_function_of_seed_and_place():
    draws = {}
    for place in [
        (3, STEP, 0, 0),
        (3, STEP, 1, 0),
        (3, STEP, 0, 1),
        (3, DATA, 0, 0),
        (4, STEP, 0, 0),
    ] * 2:
        draw()  # whatever happened before
        seed_everything_for(*place)
        numbers = draw()
        assert draws.setdefault(place, numbers) == numbers
    for column in zip(*draws.values()):
        assert len(set(column)) == 5


@pytest.mark.filterwarnings('ignore:This DataLoader will create')  # on one core
@pytest.mark.parametrize(
    'kind',
    [
        'finite',
        'infinite',
        pytest.param(
            'by aspect', marks=pytest.mark.skipif(not find_spec('mmdet'), reason='needs mmdet')
        ),
    ],
)
def test_batches_do_not_depend_on_workers_and_places_before(kind):
    whole = take(make(kind), 0, 10)
    assert len({numbers for batch in whole for numbers in batch}) == 30  # all are different
    assert take(make(kind, workers=2), 0, 10) == whole
    for start in (1, 3, 7):  # a finite epoch has three batches
        assert take(make(kind, workers=start % 3), start, 10 - start) == whole[start:]
    assert take(make(kind, seed=6), 0, 1)[0] != whole[0]


def load_and_vanish(folder):
    """Leave workers that wait to send what nobody reads: of two, each has the pipe of the other."""
    loader = DataLoader(
        Large(), 1, num_workers=2, collate_fn=list, worker_init_fn=partial(start_worker, None)
    )
    batches = iter(loader)
    next(batches)
    (folder / 'workers').write_text(' '.join(str(worker.pid) for worker in batches._workers))
    time.sleep(0.5)
    os._exit(1)


def test_workers_end_with_a_process_that_vanishes(tmp_path, monkeypatch):
    monkeypatch.setattr('cae_mm.datasets.resumable.ORPHANED_AFTER', 0.2)
    process = interrupted.start(load_and_vanish, tmp_path)
    process.join()
    assert process.exitcode == 1
    workers = [int(word) for word in (tmp_path / 'workers').read_text().split()]
    end = time.monotonic() + 4  # torch's own watch of the process takes five seconds
    while any(os.path.exists(f'/proc/{worker}') for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_epoch_goes_on_at_any_batch():
    loader = make('finite')
    loader.batch_sampler.sampler.set_epoch(4)
    whole = list(loader.epoch_from(12, 0))
    assert len(whole) == len(loader) == 3
    for batch in range(4):
        assert list(loader.epoch_from(12 + batch, batch)) == whole[batch:]
    assert list(loader.epoch_from(15, 0)) != whole  # other numbers, though the same images


def test_a_sampler_that_ends_begins_epochs_of_their_own_order():
    """Without words about the epoch it would repeat the order of the first."""
    batches = take(make('finite'), 0, 9)
    orders = [[image[0] for batch in batches[i : i + 3] for image in batch] for i in (0, 3, 6)]
    sampler = DefaultSampler(Draws(), seed=7)
    for epoch, order in enumerate(orders):
        sampler.set_epoch(epoch)
        assert order == list(sampler)[:9]
    assert len(set(map(tuple, orders))) == 3
    for start in range(9):
        assert take(make('finite'), start, 9 - start) == batches[start:]


def test_no_skipped_image_is_read(monkeypatch):
    read = []
    monkeypatch.setattr(Draws, '__getitem__', lambda _, index: read.append(index) or [index])
    [batch] = take(make('infinite'), 100_000, 1)
    assert read == [index for [index] in batch]


def test_the_wrapped_dataset_is_what_hooks_see():
    data = SeededDataset(inner := Draws())
    assert (data.metainfo, len(data), data.get_data_info(2)) == (
        inner.metainfo,
        10,
        dict(width=2, height=1),
    )
    data.pipeline = 'second'
    assert inner.pipeline == 'second'
    assert not hasattr(data, 'full_init')
    copy = pickle.loads(pickle.dumps(data))
    assert copy.pipeline == 'second' and copy.dataset is not inner


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    'loader', [DataLoader(Stream()), DataLoader(Draws(), batch_size=None)], ids=['stream', 'single']
)
def test_what_has_no_batches_of_indices_is_refused(loader):
    with pytest.raises(
        ValueError, match='read without indices of batches.*: give train_dataloader'
    ):
        ResumableLoader(loader, 0)


def test_batches_keep_their_seed_on_the_way_to_a_worker():
    sampler = resumable.ResumableBatchSampler(BatchSampler(range(4), 2, False), 3)
    sampler.iteration = 8
    batches = [pickle.loads(pickle.dumps(batch)) for batch in sampler]
    assert batches == [[0, 1], [2, 3]]
    assert [batch.seed for batch in batches] == [(3, DATA, 8, 0), (3, DATA, 9, 0)]
