import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.runner import EpochBasedTrainLoop

from cae_mm.hooks import EpochSeedHook, GumbelTemperatureHook


class FakeRunner:
    """What the hooks read of a Runner."""

    def __init__(self, **values):
        self.optim_wrapper = SimpleNamespace()
        self.__dict__.update(dict(seed=3, epoch=0, iter=0, max_iters=100) | values)


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seeds_depend_on_seed_and_epoch_alone():
    hook, draws = EpochSeedHook(), {}
    for seed, epoch in ((3, 0), (3, 1), (4, 0), (3, 0)):
        draw()  # whatever happened before
        hook.before_train_epoch(FakeRunner(seed=seed, epoch=epoch))
        numbers = draw()
        assert draws.setdefault((seed, epoch), numbers) == numbers
    assert len(set(draws.values())) == 3


@pytest.mark.parametrize(('steps', 'warned'), [(2, False), (3, False), (4, True)])
def test_gathering_is_told_the_length_of_an_epoch(steps, warned):
    loop = EpochBasedTrainLoop.__new__(EpochBasedTrainLoop)
    loop.dataloader, texts = [None] * 3, []
    wrapper = SimpleNamespace(_accumulative_counts=steps)
    logger = SimpleNamespace(warning=texts.append)
    EpochSeedHook().before_run(FakeRunner(_train_loop=loop, optim_wrapper=wrapper, logger=logger))
    assert wrapper.epoch_length == 3
    assert ['gathered over 3, not over 4' in text for text in texts] == [True] * warned


def test_seeds_differ_between_ranks(monkeypatch):
    draws = set()
    for rank in range(2):
        monkeypatch.setattr('cae_mm.hooks.training.get_rank', lambda rank=rank: rank)
        EpochSeedHook().before_train_epoch(FakeRunner())
        draws.add(draw())
    assert len(draws) == 2


def test_temperature_goes_from_start_to_end():
    runner = FakeRunner(model=torch.nn.Module())
    hook = GumbelTemperatureHook(start=1.0, end=0.2, share=0.5)
    temperatures = []
    for runner.iter in range(100):
        hook.before_train_iter(runner, 0)
        temperatures.append(runner.model.temperature)
    assert temperatures[0] == 1.0
    assert temperatures[25] == pytest.approx(0.6)  # half of the cosine
    assert temperatures[50:] == pytest.approx([0.2] * 50)
    assert sorted(temperatures, reverse=True) == temperatures
