"""Runs that end at any moment go on as if nothing had happened."""

import errno
import os
import re
import shutil
import signal
import time
import zipfile
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from builders import equal
from interrupted import CAE, read_losses, run, same_weights, start
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from cae_mm.checkpoints import read_checkpoint, whole
from cae_mm.checkpoints.whole import find_damage, find_last_whole
from cae_mm.engine.runner import CAERunner
from cae_mm.hooks.saving import TRY_AGAIN, CheckpointHook

BY_ITERATIONS = dict(
    train_cfg=dict(type='IterBasedTrainLoop', max_iters=18),
    sampler=dict(type='InfiniteSampler'),
    checkpoint=dict(by_epoch=False, interval=6),
    param_scheduler=[dict(type='PolyLR', by_epoch=False)],
)
RUNS = {
    'gathered': ('cae', dict(CAE, gathered=4)),  # of six batches: updates after 4 and 6
    'BatchNorm': ('linear', {}),
    'iterations': ('linear', BY_ITERATIONS),
    'iterations and epochs': ('linear', BY_ITERATIONS | dict(sampler={})),
}

# before which step, by what, with what status, and how many workers
ENDS = [(5, signal.SIGUSR1, TRY_AGAIN, 2), (13, signal.SIGKILL, -signal.SIGKILL, 0)]


@HOOKS.register_module()
class Pause(Hook):
    """Stand for the work of a real step."""

    def after_train_iter(self, *_, **__):
        time.sleep(0.05)


@pytest.fixture(scope='module', params=RUNS)
def undisturbed(request, tmp_path_factory):
    kind, changes = RUNS[request.param]
    folder = tmp_path_factory.mktemp(request.param.replace(' ', '_')) / 'whole'
    run(kind, folder, **changes)
    noted = read_losses(folder)
    assert sorted(noted) == list(range(18)) and len({loss for _, loss in noted.values()}) == 18
    return kind, changes, folder, noted


def last_file(folder: Path) -> Path:
    return Path((folder / 'last_checkpoint').read_text())


def test_a_killed_run_goes_on_bit_for_bit(undisturbed):
    """Told to end at the last batch of an epoch, and killed in the middle of another."""
    kind, changes, expected, noted = undisturbed
    folder = expected.with_name('killed')
    for at, sent, status, workers in ENDS:
        changes = changes | dict(at=at, sent=sent, workers=workers, resume=True)
        process = start(run, kind, folder, **changes)
        process.join()
        assert process.exitcode == status
    assert find_damage(last_file(folder)) is None
    run(kind, folder, **changes | dict(sent=0))
    assert read_losses(folder) == noted
    same_weights(last_file(folder), last_file(expected))
    assert last_file(folder).name == last_file(expected).name
    left = sorted(path.name for path in folder.glob('*.pth*'))
    assert left == sorted(path.name for path in expected.glob('*.pth*')) and len(left) == 2


def test_a_run_that_is_told_to_end_saves_first(tmp_path):
    """All of its processes get the signal, as from torchrun or Slurm; workers serve on."""
    kind, changes = RUNS['gathered']
    changes = dict(changes, checkpoint=dict(minutes=None))
    changes['hooks'] = [*changes['hooks'], dict(type='Pause')]
    process = start(run, kind, tmp_path / 'run', workers=2, **changes)
    noted = tmp_path / 'run.losses0'
    while not (noted.exists() and noted.read_text().count('\n') >= 2):
        assert process.is_alive()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == TRY_AGAIN
    file = last_file(tmp_path / 'run')
    steps = int(re.fullmatch(r'iter_(\d+).pth', file.name)[1])
    assert steps in (4, 6, 10) and len(read_losses(tmp_path / 'run')) == steps  # an update
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker is left
    run(kind, tmp_path / 'run', workers=2, resume=True, **changes)
    run(kind, tmp_path / 'whole', **changes)
    assert read_losses(tmp_path / 'run') == read_losses(tmp_path / 'whole')
    same_weights(*(last_file(tmp_path / name) for name in ('run', 'whole')))


def hear_no_more(folder: Path) -> None:
    """Train until told to end, and say what another signal would do then."""
    try:
        run('linear', folder, at=3, sent=signal.SIGTERM)
    finally:
        folder.with_name('then').write_text(str(signal.getsignal(signal.SIGTERM)))


def test_a_run_that_has_saved_ends_with_its_status_whatever_it_is_told(tmp_path):
    """Of several processes the first to end makes Slurm send SIGTERM to the others."""
    process = start(hear_no_more, tmp_path / 'run')
    process.join()
    assert process.exitcode == TRY_AGAIN
    assert (tmp_path / 'then').read_text() == str(signal.SIG_IGN)


def kill_while_writing(folder: Path, share: float) -> None:
    """Train, and die when a part of the second file is written."""
    written = []

    def fsync(file: int) -> None:
        written.append(file)
        if len(written) == 3:  # of the second file, after that of the first and of its folder
            os.ftruncate(file, int(share * os.fstat(file).st_size))
            os.kill(os.getpid(), signal.SIGKILL)

    whole.os.fsync = fsync
    run('linear', folder, checkpoint=dict(max_keep_ckpts=1, minutes=None))


@pytest.mark.parametrize('share', [0, 0.5, 1])
def test_a_run_killed_while_it_writes_keeps_the_file_before(share, tmp_path):
    process = start(kill_while_writing, tmp_path / 'run', share)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    names = {path.name for path in (tmp_path / 'run').glob('*.pth*')}
    assert names == {'epoch_1.pth', 'epoch_2.pth.unfinished'}
    (tmp_path / 'run/epoch_9.pth.unfinished').touch()  # which is not written again
    run('linear', tmp_path / 'run', checkpoint=dict(max_keep_ckpts=1), resume=True)
    assert len(read_losses(tmp_path / 'run')) == 18
    assert {path.name for path in (tmp_path / 'run').glob('*.pth*')} == {'epoch_3.pth'}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A finished run of two epochs."""
    folder = tmp_path_factory.mktemp('finished') / 'run'
    run('linear', folder, train_cfg=dict(by_epoch=True, max_epochs=2))
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A copy elsewhere; ``last_checkpoint`` names files of the original."""
    shutil.copytree(finished, tmp_path / 'run')
    (tmp_path / 'run/last_checkpoint').write_text('moved/away/epoch_2.pth')
    return tmp_path / 'run'


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    """In the middle of the largest tensor."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda info: info.file_size)
    content[part.header_offset + 128 + part.file_size // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize('damage', [truncate, flip_a_bit, Path.unlink, lambda p: os.truncate(p, 0)])
def test_a_damaged_last_file_is_named_and_passed_over(damage, copy, caplog):
    damage(copy / 'epoch_2.pth')
    warnings: list[str] = []
    assert find_last_whole(copy, warnings.append) == copy / 'epoch_1.pth'
    texts = [rf'{copy}/epoch_2.pth is damaged \(.+\): the one before is taken']
    assert len(warnings) == (damage is not Path.unlink)
    assert all(re.fullmatch(*pair) for pair in zip(texts, warnings))
    runner = run('linear', copy, resume=True)
    assert min(read_losses(copy)) == 6 and runner.iter == 18  # goes on after the first epoch


def test_damage_that_nothing_mends_is_an_error(copy):
    truncate(copy / 'epoch_2.pth')
    options = dict(resume=True, load_from=str(copy / 'epoch_2.pth'))
    message = rf'{copy}/epoch_2.pth is damaged .*; these are whole: {copy}/epoch_1.pth$'
    with pytest.raises(ValueError, match=message):
        run('linear', copy, **options)
    truncate(copy / 'epoch_1.pth')
    with pytest.raises(ValueError, match='epoch_2.pth is damaged .*; none beside it is whole'):
        run('linear', copy, **options)
    message = 'no checkpoint is whole: .*epoch_2.pth is.*epoch_1.pth is.*Remove them to start from'
    with pytest.raises(ValueError, match=message):
        run('linear', copy, resume=True)


def test_every_damaged_byte_is_found_or_does_no_harm(copy):
    """One flipped bit at any of many places."""
    path = copy / 'epoch_2.pth'
    content, expected = path.read_bytes(), read_checkpoint(path).state
    found = 0
    rng = np.random.default_rng(0)
    for place in rng.integers(8 * len(content), size=200):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        if find_damage(path) is None:
            for name, value in read_checkpoint(path).state.items():
                equal(value, expected[name])
        else:
            found += 1
    assert found > 100


@HOOKS.register_module()
class FillTheDisk(Hook):
    """Make writing the second file fail as on a full disk: /dev/full is one."""

    def before_train_epoch(self, runner):
        if runner.epoch == 1 and get_rank() == 0:
            Path(runner.work_dir, 'epoch_2.pth.unfinished').symlink_to('/dev/full')


def test_a_full_disk_stops_the_run_with_all_that_is_to_be_known(tmp_path):
    checkpoint = dict(max_keep_ckpts=1, minutes=None)
    changes = dict(checkpoint=checkpoint, hooks=[dict(type='FillTheDisk')])
    message = (
        rf'{tmp_path}/run/epoch_2.pth cannot be written: it takes 0.\d MB, and .* MB are free '
        r'\(No space left on device\).*: make room and start again, a training with --resume'
    )
    with pytest.raises(OSError, match=message) as error:
        run('linear', tmp_path / 'run', **changes)
    assert error.value.errno == errno.ENOSPC
    assert {path.name for path in (tmp_path / 'run').glob('*.pth*')} == {'epoch_1.pth'}
    assert find_damage(tmp_path / 'run/epoch_1.pth') is None
    run('linear', tmp_path / 'run', checkpoint=checkpoint, resume=True)
    assert len(read_losses(tmp_path / 'run')) == 18


@HOOKS.register_module()
class Improve(Hook):
    """Evaluate after each epoch but the last, better each time."""

    def before_train_epoch(self, runner):
        if runner.epoch == 0:
            return
        [hook] = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
        hook.after_val_epoch(runner, dict(acc=runner.epoch))


def test_the_best_file_is_replaced_after_the_new_one_is_there(tmp_path, monkeypatch):
    present = []

    def spy(path, data):
        present.append({other.name for other in path.parent.glob('*.pth')})
        write(path, data)

    write = whole.write_whole
    monkeypatch.setattr(whole, 'write_whole', spy)
    checkpoint = dict(max_keep_ckpts=1, minutes=None, save_best='acc', rule='greater')
    run('linear', tmp_path / 'run', checkpoint=checkpoint, hooks=[dict(type='Improve')])
    assert present[3:5] == [{f'epoch_{i}.pth', 'best_acc_epoch_1.pth'} for i in (1, 2)]
    left = {path.name for path in (tmp_path / 'run').glob('*.pth')}
    assert left == {'epoch_3.pth', 'best_acc_epoch_2.pth'}


def test_another_length_of_an_epoch_begins_it_again(tmp_path):
    """Six batches before, four now: what was seen of the epoch cannot be told in batches."""
    process = start(run, 'linear', tmp_path / 'one', at=8, sent=signal.SIGUSR1)
    process.join()
    assert process.exitcode == TRY_AGAIN
    file = tmp_path / 'one/iter_9.pth'
    options = dict(load_from=str(file), resume=True, batch=3, log_level='WARNING')
    run('linear', tmp_path / 'other', **options)
    assert [batch for batch, _ in read_losses(tmp_path / 'other').values()] == [0, 1, 2, 3] * 2
    assert sorted(read_losses(tmp_path / 'other')) == list(range(4, 12))
    [log] = (tmp_path / 'other').glob('*/*.log')
    text = 'of a run with 6 batches an epoch, this one has 4: it begins epoch 2 again'
    assert text in log.read_text()


@HOOKS.register_module()
class NoteRates(Hook):
    """The learning rate of each step."""

    priority = 'VERY_HIGH'  # before the schedules

    def __init__(self):
        self.rates: dict[int, float] = {}

    def after_train_iter(self, runner, *_, **__):
        self.rates[runner.iter] = runner.optim_wrapper.get_lr()['lr'][0]


def rates_of(runner) -> dict[int, float]:
    [hook] = [hook for hook in runner.hooks if isinstance(hook, NoteRates)]
    return hook.rates


RATES = dict(hooks=[dict(type='NoteRates')], log_level='WARNING')
SCHEDULES = [
    dict(type='LinearLR', start_factor=0.1, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=1, eta_min=0.1, convert_to_iter_based=True),
    dict(type='ConstantLR', factor=0.5, begin=0, end=2),  # by epochs
]


@pytest.mark.parametrize(
    ('by', 'file', 'first'),
    [('epochs', 'epoch_2', 8), ('epochs', 'iter_9', 4), ('iterations', 'iter_20', 10)],
)
def test_schedules_go_on_where_steps_are_counted_anew(by, file, first, tmp_path):
    """At the rates of a run of this batch, whatever batch had been before."""
    if by == 'epochs':
        before, now = dict(batch=2), dict(batch=3)
        both = RATES | dict(param_scheduler=SCHEDULES)
    else:
        both = RATES | BY_ITERATIONS | dict(auto_scale_lr=dict(enable=True, base_batch_size=6))
        both['param_scheduler'] = [dict(type='PolyLR', by_epoch=False, eta_min=0.01, power=0.9)]
        before, now = dict(batch=3, gathered=2), dict(batch=6)
    at = int(file.partition('_')[2]) - 1 if 'iter' in file else -1
    process = start(run, 'linear', tmp_path / 'one', at=at, sent=signal.SIGUSR1, **both, **before)
    process.join()
    expected = rates_of(run('linear', tmp_path / 'whole', **both, **now))
    assert len(set(expected.values())) > 6
    resumed = dict(load_from=str(tmp_path / f'one/{file}.pth'), resume=True)
    rates = rates_of(run('linear', tmp_path / 'other', **both, **now, **resumed))
    assert sorted(rates) == list(range(first, len(expected)))
    for step, rate in rates.items():
        assert rate == pytest.approx(expected[step], rel=1e-12)


def test_a_run_that_is_past_its_end_removes_nothing(tmp_path):
    process = start(run, 'linear', tmp_path / 'run', at=8, sent=signal.SIGUSR1)
    process.join()
    before = sorted((tmp_path / 'run').glob('*.pth'))
    assert tmp_path / 'run/iter_9.pth' in before
    run('linear', tmp_path / 'run', train_cfg=dict(by_epoch=True, max_epochs=1), resume=True)
    assert sorted((tmp_path / 'run').glob('*.pth')) == before


def test_files_are_written_by_the_clock(tmp_path, monkeypatch):
    """A clock that is looked at once an update and goes half a minute meanwhile."""
    names, save = [], CAERunner.save_checkpoint

    def spy(runner, folder, name, *args, **options):
        names.append(name)
        save(runner, folder, name, *args, **options)

    monkeypatch.setattr(CAERunner, 'save_checkpoint', spy)
    ticks = count(0, 30)
    monkeypatch.setattr('cae_mm.hooks.saving.time', SimpleNamespace(monotonic=lambda: next(ticks)))
    run('linear', tmp_path / 'run', checkpoint=dict(minutes=2.2, interval=2))
    assert names == [f'{name}.pth' for name in 'iter_5 iter_10 epoch_2 iter_17 epoch_3'.split()]


@pytest.mark.parametrize(('steps', 'warned'), [(2, False), (6, False), (7, True)])
def test_gathering_is_told_the_length_of_an_epoch(steps, warned, tmp_path):
    changes = dict(gathered=1, log_level='WARNING', train_cfg=dict(by_epoch=True, max_epochs=1))
    changes['optim_wrapper'] = dict(
        type='cae_mm.MixedPrecisionOptimWrapper',
        optimizer=dict(type='SGD', lr=0.1),
        accumulative_counts=steps,
    )
    runner = run('linear', tmp_path / 'run', **changes)
    assert runner.optim_wrapper.epoch_length == 6
    [log] = (tmp_path / 'run').glob('*/*.log')
    assert ('gathered over 6, not over 7' in log.read_text()) == warned
