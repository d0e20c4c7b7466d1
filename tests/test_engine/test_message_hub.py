"""Numbers of a log without waiting for the device: the same numbers, read when looked at."""

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub

from cae_mm.engine import message_hub
from cae_mm.engine.message_hub import HISTORY, DeferredMessageHub


@pytest.fixture
def reads(monkeypatch):
    """How many numbers each transfer from the device has read."""
    counts, read = [], message_hub.read_scalars

    def spy(tensors):
        if tensors:
            counts.append(len(tensors))
        return read(tensors)

    monkeypatch.setattr(message_hub, 'read_scalars', spy)
    return counts


def make(cls=DeferredMessageHub):
    return cls(f'{cls.__name__}{np.random.random()}')


def fill(hub, steps=4):
    """Steps with numbers of all kinds; the time is looked at in each, as ``IterTimerHook`` does."""
    for i in range(steps):
        hub.update_scalar('train/lr', 0.1 * i)
        hub.update_scalar('train/time', 2.0 + i)
        assert hub.get_scalar('train/time').current() == 2 + i
        hub.update_scalar('train/loss', torch.tensor(1 / (i + 3), requires_grad=True))
        hub.update_scalar('train/half', torch.tensor([1 / (i + 3)], dtype=torch.bfloat16), count=2)
        hub.update_scalar('train/acc', 0 if i == 1 else torch.tensor(i))
        hub.update_scalar('train/numpy', np.float32(i), resumed=False)


def same(one, other):
    assert list(one) == list(other)  # the order of a line, too
    for key in one:
        for a, b in zip(one[key].data, other[key].data, strict=True):
            assert np.array_equal(a, b), key


def test_histories_are_those_of_mmengine():
    ours, theirs = make(), make(MessageHub)
    for hub in (ours, theirs):
        fill(hub)
    same(ours.log_scalars, theirs.log_scalars)
    for hub in (ours, theirs):
        fill(hub, 2)
    state = ours.state_dict()  # pending numbers are in checkpoints
    same(state['log_scalars'], theirs.state_dict()['log_scalars'])
    resumed = make()
    resumed.load_state_dict(state)
    for hub in (resumed, theirs):
        fill(hub, 1)
    assert resumed.log_scalars['train/loss'].mean(5) == theirs.log_scalars['train/loss'].mean(5)


def test_all_is_read_at_the_first_look(reads):
    hub = make()
    fill(hub, 4)
    assert not reads
    assert hub.get_scalar('train/loss').current() == pytest.approx(1 / 6)
    assert reads == [4 + 4 + 3]
    assert hub.log_scalars['train/half'].data[1].tolist() == [2] * 4
    assert reads == [11]


def test_histories_end_somewhere(reads):
    """For each number that is added mmengine copies all of them."""
    hub = make()
    hub.load_state_dict(
        dict(
            log_scalars={'train/loss': HistoryBuffer(np.zeros(3 * HISTORY), np.ones(3 * HISTORY))},
            runtime_info={},
            resumed_keys={},
        )
    )
    for i in range(HISTORY + 1):
        hub.update_scalar('train/loss', torch.tensor(float(i)))
    assert reads == [HISTORY]  # where nobody looks, tensors must not pile up
    values = hub.get_scalar('train/loss').data[0]
    assert values.tolist() == [float(i) for i in range(1, HISTORY + 1)]


@pytest.mark.parametrize('value', [torch.zeros(2), torch.zeros(0)])
def test_no_number_is_refused_at_once(value):
    with pytest.raises(AssertionError):
        make().update_scalar('train/loss', value)


def test_unknown_numbers_are_named():
    with pytest.raises(KeyError, match='train/loss is not found'):
        make().get_scalar('train/loss')
