"""Two processes train what one process trains: DDP, FSDP, and BatchNorm over processes."""

import math
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from builders import cae_config, close
from interrupted import CAE, interrupt_one_of_two, same_weights
from mmengine.config import Config
from two_processes import (
    MODELS_TO_TRAIN,
    in_two_processes,
    run_config,
    train,
    train_all,
    train_faulty,
)

from cae_mm.checkpoints import read_checkpoint
from cae_mm.checkpoints.description import KEY
from cae_mm.engine import sharding
from cae_mm.engine.faults import read_fault
from cae_mm.engine.fitting import fit_config, wrapper_options
from cae_mm.hooks.saving import TRY_AGAIN
from cae_mm.replay import replay

KINDS = [kind for kind in MODELS_TO_TRAIN if kind != 'upernet' or find_spec('mmseg')]
MODES = ['ddp', 'fsdp'] if sharding.fully_shard else ['ddp']
RUNS = [(kind, mode) for kind in KINDS for mode in MODES if (kind, mode) != ('recomputed', 'ddp')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def alone(folder):
    """Losses of one process with the whole batch."""
    return {kind: train(kind, folder / kind).losses for kind in KINDS}


@pytest.fixture(scope='module')
def together(folder, alone):
    """What each of two processes says of its runs with half of each batch."""
    more = partial(interrupt_one_of_two, kind='cae', changes=CAE)
    return in_two_processes(train_all, folder, RUNS, more)


@pytest.fixture(scope='module')
def faulty(folder):
    """What one process has after two epochs of which each second step has no finite loss."""
    train_faulty(folder / 'faulty')
    return read_checkpoint(folder / 'faulty/epoch_2.pth')


def files(folder: Path, kind: str, mode: str, epoch: int = 2):
    names = (kind, f'{kind}-{mode}')
    return [torch.load(folder / name / f'epoch_{epoch}.pth', weights_only=False) for name in names]


@pytest.mark.parametrize(('kind', 'mode'), RUNS)
def test_losses_are_those_of_one_process(kind, mode, alone, together):
    losses = [process[kind, mode]['losses'] for process in together]
    mean = [sum(both) / 2 for both in zip(*losses, strict=True)]
    assert len(alone[kind]) == 4 and alone[kind][-1] < alone[kind][0]
    assert mean == pytest.approx(alone[kind], rel=1e-9)
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)  # each saw images of its own


def test_recomputed_activations_change_nothing(alone):
    assert alone['recomputed'] == alone['cae']


@pytest.mark.parametrize(('kind', 'mode'), RUNS)
def test_one_file_with_whole_tensors(kind, mode, folder, together):
    """Weights, statistics and states of the optimizer are those of one process."""
    expected, file = files(folder, kind, mode)
    assert file['state_dict'].keys() == expected['state_dict'].keys()
    for name, value in expected['state_dict'].items():
        close(file['state_dict'][name], value, 1e-8)
    states = file['optimizer']['state']
    assert states.keys() == expected['optimizer']['state'].keys()
    for i, state in expected['optimizer']['state'].items():
        for name, value in state.items():
            close(states[i][name], value, 1e-7)
    assert file['meta'][KEY] == expected['meta'][KEY]
    safely = read_checkpoint(folder / f'{kind}-{mode}/epoch_2.pth')  # no pickle of torch's shards
    assert safely.state.keys() == expected['state_dict'].keys()


@pytest.mark.parametrize(('kind', 'mode'), RUNS)
def test_buffers_are_the_same_on_all_processes(kind, mode, together):
    first, second = (process[kind, mode]['buffers'] for process in together)
    statistics = [name for name in first if name.endswith('running_var')]
    assert bool(statistics) == (kind not in ('cae', 'recomputed'))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.skipif('fsdp' not in MODES, reason='needs torch 2.6')
def test_each_process_keeps_its_share(together):
    total, *shares = (
        process['cae', mode]['kept']
        for mode, process in [('ddp', together[0]), *(('fsdp', process) for process in together)]
    )
    assert sum(shares) == total
    assert all(share < 0.6 * total for share in shares)


@pytest.mark.skipif('fsdp' not in MODES, reason='needs torch 2.6')
def test_runs_go_on_sharded_or_not(folder, alone, together):
    """From a file of one process on two that share, and the other way round."""
    sharded = [process['resumed']['losses'] for process in together]
    mean = [sum(both) / 2 for both in zip(*sharded, strict=True)]
    assert mean == pytest.approx(alone['cae'][2:], rel=1e-9)
    file = folder / 'cae-fsdp/epoch_1.pth'
    runner = train('cae', folder / 'back', resume=True, load_from=str(file))
    assert runner.losses == pytest.approx(alone['cae'][2:], rel=1e-9)


def test_a_signal_that_reaches_one_ends_both(folder, together):
    """At the same update; what follows is that of a run which nothing disturbed."""
    for process in together:
        assert (process['more']['status'], process['more']['steps']) == (TRY_AGAIN, 5)
        whole, told = process['more']['noted']
        assert told == whole and len(whole) == 9
    assert together[0]['more']['noted'] != together[1]['more']['noted']
    same_weights(*(folder / name / 'epoch_3.pth' for name in ('whole-2', 'told-2')))


def test_gradients_are_reduced_only_before_updates(together):
    """Three steps of one image on each process for an update."""
    first, second = (process['gathered'] for process in together)
    assert first['reduced'] == second['reduced'] == [2, 5, 8, 11]
    assert len(first['losses']) == 12


def test_gathered_steps_are_those_of_one_process(folder, together):
    whole, file = (
        torch.load(folder / name / 'epoch_2.pth', weights_only=False)['state_dict']
        for name in ('cae', 'gathered')
    )
    for name, value in whole.items():
        close(file[name], value, 1e-8)


@pytest.mark.parametrize('mode', MODES)
def test_a_fault_of_one_process_is_one_of_both(mode, folder, faulty, together):
    """Each second step one of them has a broken loss: they skip what a process alone skips."""
    losses = [process['faulty', mode]['losses'] for process in together]
    assert [[math.isfinite(loss) for loss in mine] for mine in losses] == [
        [True] * 4,
        [True, False] * 2,
    ]
    run = folder / f'faulty-{mode}'
    file = read_checkpoint(run / 'epoch_2.pth')
    for name, value in faulty.state.items():
        close(file.state[name], value, 1e-8)
    for i, state in faulty.content['optimizer']['state'].items():
        assert file.content['optimizer']['state'][i]['step'] == state['step'] == 2
    faults = [read_fault(run / f'faults/iter_2_rank_{rank}.json') for rank in range(2)]
    assert faults[0].reason == "another process' loss is not finite"
    assert faults[1].reason == 'the loss is nan'
    assert faults[1].batches[0].images == ['7.png', '9.png', '11.png']
    state = read_checkpoint(run / 'faults' / faults[0].weights).state
    for name, value in read_checkpoint(run / 'epoch_1.pth').state.items():
        assert torch.equal(state[name], value)


def test_a_step_of_either_process_is_repeated_by_one(folder, together):
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        first, second = (
            replay(folder / f'faulty-ddp/faults/iter_2_rank_{rank}.json') for rank in range(2)
        )
    finally:
        torch.set_default_dtype(default)
    assert first.losses == first.fault.losses
    assert not first.modules and 'another process' in str(first)
    assert second.modules[0] == 'data_preprocessor'


def test_a_wrapper_of_the_config_is_kept(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    ours = wrapper_options(Config(dict(find_unused_parameters=True)))
    assert ours == dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=True,
    )
    changed = wrapper_options(Config(dict(model_wrapper_cfg=dict(bucket_cap_mb=100))))
    assert changed == ours | dict(bucket_cap_mb=100, find_unused_parameters=False)
    other = dict(type='MMSeparateDistributedDataParallel')
    assert wrapper_options(Config(dict(model_wrapper_cfg=other))) == other


def test_what_cannot_be_sharded_is_named(tmp_path, monkeypatch):
    settings = dict(settings=dict(fsdp=True))
    cfg = run_config('cae', tmp_path, 1, **settings)
    cfg.model = cae_config(teacher_momentum=0.9)
    monkeypatch.setattr(sharding, 'fully_shard', lambda module: module)
    with pytest.raises(ValueError, match='settings.fsdp .* model.teacher_momentum .*: choose one'):
        fit_config(cfg)
    monkeypatch.setattr(sharding, 'fully_shard', None)
    with pytest.raises(ValueError, match='settings.fsdp needs torch 2.6, this is'):
        fit_config(run_config('cae', tmp_path, 1, **settings))
