import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.runner import EpochBasedTrainLoop
from mmpretrain.structures import DataSample

from cae_mm.hooks import EpochSeedHook, GumbelTemperatureHook, NonFiniteLossHook


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


def run_steps(hook, runner, losses, norms=None):
    """Train steps of two images each, with these losses and norms of gradients."""
    for i, loss in enumerate(losses):
        samples = [DataSample(metainfo=dict(img_path=f'{name}{i}.jpg')) for name in 'ab']
        runner.optim_wrapper.grad_norm = torch.tensor(norms[i]) if norms and norms[i] else None
        outputs = {'loss': torch.tensor(loss, requires_grad=True)}
        hook.after_train_iter(runner, i, {'data_samples': samples}, outputs)
        runner.iter += 1


def make_runner(length=100, **values):
    """A run that logs each third step."""
    hooks = [LoggerHook(interval=3)]
    return FakeRunner(train_dataloader=[None] * length, hooks=hooks, **values)


@pytest.mark.parametrize('at', [0, 1, 2])
def test_a_broken_loss_is_named_when_a_line_is_due(at):
    runner, losses = make_runner(iter=41, epoch=1), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    losses[3 + at :] = [math.nan, *[math.inf] * (2 - at)]  # those that follow are broken too
    with pytest.raises(FloatingPointError) as error:
        run_steps(NonFiniteLossHook(), runner, losses)
    assert runner.iter == 46  # the sixth step, after which a line is due
    message = (
        rf'the loss is nan at iteration {45 + at} \(epoch 2\); '
        rf"images of the batch on this process: \['a{3 + at}.jpg', 'b{3 + at}.jpg'\]"
    )
    assert re.match(message, str(error.value))


@pytest.mark.parametrize(
    ('hook', 'values'),
    [
        (CheckpointHook(interval=2, by_epoch=False), dict(length=100)),
        (LoggerHook(interval=50), dict(length=2)),
        (LoggerHook(interval=50), dict(max_iters=2)),
    ],
    ids=['checkpoint', 'epoch', 'training'],
)
def test_a_broken_loss_is_named_before_a_checkpoint_is_due(hook, values):
    runner = make_runner(**values)
    runner.hooks = [hook]
    with pytest.raises(FloatingPointError, match='the loss is inf at iteration 1'):
        run_steps(NonFiniteLossHook(), runner, [math.inf, 1.0])


def test_no_checkpoint_has_broken_weights():
    """Whoever writes it."""
    hook = NonFiniteLossHook()
    run_steps(hook, make_runner(), [1.0, math.nan])
    with pytest.raises(FloatingPointError, match='at iteration 2'):
        hook.before_save_checkpoint(make_runner(), {})


def test_a_loss_that_broke_on_another_process_stops_this_one_too():
    """Through the gradients, which are the same everywhere; loss scaling expects overflows."""
    runner, norms = make_runner(), [None, math.inf, None]  # an update in the second step only
    with pytest.raises(FloatingPointError, match='the norm of the gradients is inf at iteration 2'):
        run_steps(NonFiniteLossHook(), runner, [1.0] * 3, norms)
    runner.optim_wrapper.loss_scaler = torch.amp.GradScaler('cpu')
    run_steps(NonFiniteLossHook(), runner, [1.0] * 3, norms)


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
