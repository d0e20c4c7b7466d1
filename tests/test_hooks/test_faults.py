"""Broken steps are skipped, recorded, counted alike; no file has broken weights."""

import json
import math
import re
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import CheckpointHook, EMAHook, LoggerHook
from mmengine.optim import build_optim_wrapper
from mmpretrain.structures import DataSample
from two_processes import train_faulty

from cae_mm.checkpoints import read_checkpoint
from cae_mm.engine.faults import read_fault
from cae_mm.hooks import NumericalFaultHook, faults


class FakeRunner:
    """What the hook reads of a run that logs each third step, and what it says to it."""

    epoch, iter, seed, max_iters, timestamp = 1, 41, 3, 1000, 'now'

    def __init__(self, length=100, optim_wrapper=None, **values):
        self.optim_wrapper = optim_wrapper or SimpleNamespace()
        self.train_dataloader, self.hooks = [None] * length, [LoggerHook(interval=3)]
        self.warnings, self.work_dir = [], 'absent'
        self.logger = SimpleNamespace(warning=self.warnings.append)
        self.__dict__.update(values)


def skipping_wrapper():
    cfg = dict(type='cae_mm.MixedPrecisionOptimWrapper', dtype='float32')
    return build_optim_wrapper(torch.nn.Linear(1, 1), cfg | dict(optimizer=dict(type='SGD', lr=1)))


@pytest.fixture
def far_away(monkeypatch):
    """Numbers lie on a device for which a step would have to wait."""
    monkeypatch.setattr(faults, 'reads_at_once', lambda _: False)


def run_steps(hook, runner, losses, norms=None):
    """Train steps of two images each, with these losses and norms of gradients (None: gathers)."""
    for i, loss in enumerate(losses):
        samples = [DataSample(metainfo=dict(img_path=f'{name}{i}.jpg')) for name in 'ab']
        if norms:
            runner.optim_wrapper.grad_norm = None if norms[i] is None else torch.tensor(norms[i])
        outputs = {'loss': torch.tensor(loss, requires_grad=True)}
        hook.after_train_iter(runner, i, {'data_samples': samples}, outputs)
        runner.iter += 1


@pytest.mark.parametrize('at', [0, 1, 2])
def test_a_broken_loss_is_named_when_a_line_is_due(at, far_away):
    """A wrapper that does not skip such updates ends the run."""
    runner, losses = FakeRunner(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    losses[3 + at :] = [math.nan, *[math.inf] * (2 - at)]  # those that follow are broken too
    with pytest.raises(FloatingPointError, match='faults within 1000 steps'):
        run_steps(NumericalFaultHook(max_dumps=0), runner, losses)
    assert runner.iter == 46  # the sixth step, after which a line is due
    assert len(runner.warnings) == 3 - at
    message = (
        rf'the loss is nan at iteration {45 + at} \(epoch 2\): '
        rf"images of this process: \['a{3 + at}.jpg', 'b{3 + at}.jpg'\]"
    )
    assert re.match(message, runner.warnings[0])


@pytest.mark.parametrize(
    ('hook', 'values'),
    [
        (CheckpointHook(interval=2, by_epoch=False), dict(iter=0)),
        (LoggerHook(interval=50), dict(length=2)),
        (LoggerHook(interval=50), dict(max_iters=43)),
    ],
    ids=['checkpoint', 'epoch', 'training'],
)
def test_a_broken_loss_is_named_before_a_checkpoint_is_due(hook, values, far_away):
    runner = FakeRunner(hooks=[hook], **values)
    with pytest.raises(FloatingPointError, match='the loss is inf at iteration'):
        run_steps(NumericalFaultHook(max_dumps=0), runner, [math.inf, 1.0])


def test_on_a_cpu_nothing_is_waited_for():
    runner = FakeRunner()
    with pytest.raises(FloatingPointError, match='the loss is nan at iteration 42'):
        run_steps(NumericalFaultHook(max_dumps=0), runner, [math.nan, 1.0])


def test_gradients_are_judged_where_an_update_was():
    """Each gathered batch may be the cause, unless one's loss was; float16 may overflow."""
    runner = FakeRunner(optim_wrapper=skipping_wrapper())
    hook, found = NumericalFaultHook(), []
    hook._dump = lambda _, faults: found.extend(faults)
    norms = [None, math.inf, None, 1.0, None, math.nan, None, 1.0]
    run_steps(hook, runner, [1.0] * 4 + [math.nan] + [1.0] * 3, norms)
    assert [(x.reason, x.iteration, len(x.batches)) for x in found] == [
        ('the norm of the gradients is inf', 43, 2),
        ('the loss is nan', 46, 1),
    ]
    assert found[0].batches[0].images == ['a0.jpg', 'b0.jpg']
    run_steps(hook, runner, [1.0, 1.0], [None, math.inf])  # what was lost with the loss is over
    assert found[2].reason == 'the norm of the gradients is inf'
    runner.optim_wrapper.loss_scaler = torch.amp.GradScaler('cpu')
    run_steps(hook, runner, [1.0, 1.0], [None, math.inf])
    assert len(found) == 3
    run_steps(hook, runner, [math.inf])
    assert found[3].reason == 'the loss is inf'


def test_faults_are_survived_up_to_the_limit_of_a_window():
    runner = FakeRunner(optim_wrapper=skipping_wrapper())
    hook = NumericalFaultHook(limit=2, window=10, max_dumps=0)
    run_steps(hook, runner, ([math.nan] + [1.0] * 4) * 4)  # two within ten steps
    assert len(runner.warnings) == 4 and 'the update is skipped' in runner.warnings[0]
    run_steps(hook, runner, [math.nan])
    message = (
        r'3 faults within 10 steps, more than 2; the last: the loss is nan at iteration 63 '
        r"\(epoch 2\); images of this process: \['a0.jpg', 'b0.jpg'\]. Repeat a step of "
        r'absent/faults.* lower learning rate'
    )
    with pytest.raises(FloatingPointError, match=message):
        run_steps(hook, runner, [math.nan])


def test_no_checkpoint_has_broken_weights():
    """Whatever broke them, here an update that is too large."""
    state = {'fine': torch.ones(2), 'n': torch.tensor(1), 'weight': torch.tensor([1.0, torch.inf])}
    with pytest.raises(FloatingPointError, match='1 tensors .* iteration 41, weight the first'):
        NumericalFaultHook().before_save_checkpoint(FakeRunner(), {'state_dict': state})
    del state['weight']
    NumericalFaultHook().before_save_checkpoint(FakeRunner(), {'state_dict': state})


def test_a_run_goes_on_without_the_broken_batch(tmp_path):
    """Four steps, of which each second has an image that is NaN."""
    runner = train_faulty(tmp_path)
    assert [math.isfinite(loss) for loss in runner.losses] == [True, False] * 2
    last = read_checkpoint(tmp_path / 'epoch_2.pth')
    assert all(x.isfinite().all() for x in last.state.values())
    steps = {int(state['step']) for state in last.content['optimizer']['state'].values()}
    assert steps == {2}
    folder = tmp_path / 'faults'
    files = sorted(folder.glob('*.json'))
    assert [file.name for file in files] == [f'iter_{i}_rank_0.json' for i in (2, 4)]
    fault = read_fault(files[1])
    assert str(fault) == 'the loss is nan at iteration 4 (epoch 2)'
    [batch] = fault.batches
    assert (batch.iteration, batch.epoch, batch.index) == (3, 1, 1)
    assert batch.images == [f'{i}.png' for i in range(6, 12)]
    assert (fault.seed, fault.precision, fault.world_size) == (0, 'float32', 1)
    assert math.isnan(fault.losses['loss_main']) and 'latent_std' in fault.losses
    # an update that was skipped: these are the weights of the step, and of the epoch's end
    weights = read_checkpoint(folder / fault.weights).state
    for name, value in read_checkpoint(tmp_path / 'epoch_2.pth').state.items():
        assert torch.equal(weights[name], value)


def test_a_run_with_too_many_faults_goes_back_then_ends(tmp_path, monkeypatch):
    """To the weights and the optimizer of its checkpoint, with the schedule's learning rate."""
    went_back, go_back = [], NumericalFaultHook._go_back

    def watch(hook, runner, last):
        optimizer = runner.optim_wrapper.optimizer
        before = optimizer.param_groups[0]['lr']
        go_back(hook, runner, last)
        assert optimizer.param_groups[0]['lr'] == before
        went_back.append((runner.iter + 1, deepcopy(runner.model.state_dict())))

    monkeypatch.setattr(NumericalFaultHook, '_go_back', watch)
    changes = dict(
        guard=dict(limit=1, rollbacks=1, max_dumps=1),
        param_scheduler=[dict(type='ExponentialLR', gamma=0.5, by_epoch=False)],
        train_cfg=dict(by_epoch=True, max_epochs=5),
    )
    message = '2 faults within 1000 steps, more than 1; the last: the loss is nan at iteration 8'
    with pytest.raises(FloatingPointError, match=message):
        train_faulty(tmp_path, **changes)
    [(iteration, weights)] = went_back
    assert iteration == 4
    saved = read_checkpoint(tmp_path / 'epoch_1.pth')
    for name, value in saved.state.items():
        assert torch.equal(weights[name], value)
    assert len(list((tmp_path / 'faults').glob('*.json'))) == 1
    # one update before and two after it went back to the first
    steps = read_checkpoint(tmp_path / 'epoch_3.pth').content['optimizer']['state'].values()
    assert {int(state['step']) for state in steps} == {2}


def test_going_back_needs_a_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match='1 faults within .* at iteration 2'):
        train_faulty(tmp_path, guard=dict(limit=0, rollbacks=1))


def test_averages_cannot_go_back():
    runner = FakeRunner(hooks=[EMAHook()])
    with pytest.raises(ValueError, match='NumericalFaultHook.rollbacks and EMAHook: .* choose one'):
        NumericalFaultHook(rollbacks=1).before_run(runner)
    NumericalFaultHook().before_run(runner)


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        (lambda x: x.pop('batches'), 'batches'),
        (lambda x: x.update(weights='../other.pth'), 'names ../other.pth, which does not lie'),
        (lambda x: x.update(more=1), 'more'),
    ],
)
def test_another_file_is_named(tmp_path, change, text):
    batch = dict(iteration=0, epoch=0, index=0, images=[])
    fault = dict(reason='', losses={}, batches=[batch], seed=0, rank=0, world_size=1)
    fault |= dict(precision='float32', config='a.py', weights='b.pth')
    path = tmp_path / 'fault.json'
    path.write_text(json.dumps(fault))
    assert read_fault(path).iteration == 1
    change(fault)
    path.write_text(json.dumps(fault))
    with pytest.raises(ValueError, match=f'{path}.*{text}'):
        read_fault(path)
