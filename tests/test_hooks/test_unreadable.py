"""A run over files of which some are bad ends, with the exact list of them."""

from itertools import count

import pytest
from bad_files import make_mixed_folder, noise
from builders import make_images
from data_runs import data_config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from cae_mm.datasets.unreadable import get_found
from cae_mm.engine import CAERunner

RUNS = count()


@HOOKS.register_module()
class RecordPaths(Hook):
    """Keep which images each step has."""

    def before_train(self, runner):
        runner.paths = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs=None):
        runner.paths.append([sample.img_path for sample in data_batch['data_samples']])


def train(root, work_dir, epochs=1, resume=False, **options):
    """Train on a folder with the hook, whose options begin with ``hook_``."""
    hook = {key[5:]: options.pop(key) for key in list(options) if key.startswith('hook_')}
    cfg = data_config(root, work_dir, on_error='skip', **options)
    cfg.custom_hooks = [dict(type='cae_mm.SafeLoadHook')]
    cfg.custom_hooks += [dict(type='RecordPaths'), dict(hook, type='cae_mm.UnreadableImagesHook')]
    cfg.train_cfg.max_epochs = epochs
    cfg.train_dataloader.collate_fn = dict(type='default_collate')
    cfg.default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
    cfg.update(log_level='WARNING', resume=resume, experiment_name=f'unreadable-{next(RUNS)}')
    runner = CAERunner.from_cfg(cfg)
    runner.train()
    assert get_found() is None  # what is read afterwards is not collected
    return runner


def read_list(work_dir):
    """Reasons by path, each of which comes once."""
    lines = [line.split('\t') for line in (work_dir / 'unreadable.txt').read_text().splitlines()]
    assert len(dict(lines)) == len(lines)
    return dict(lines)


@pytest.mark.parametrize('workers', [0, 2])
def test_list_is_exact(tmp_path, workers):
    bad = make_mixed_folder(tmp_path / 'images', 200, 0.05)
    options = dict(num_workers=workers, batch_size=8)
    runner = train(tmp_path / 'images', tmp_path / 'run', epochs=2, **options)
    reasons = read_list(tmp_path / 'run')
    assert reasons.keys() == bad.keys() and len(bad) == 10
    assert reasons[next(p for p in bad if p.endswith('00000.jpg'))] == 'the file is empty'
    seen = {path for paths in runner.paths for path in paths}
    assert len(runner.paths) == 50 and all(len(paths) == 8 for paths in runner.paths)
    assert len(seen) == 190 and not seen & bad.keys()  # whole batches of good images
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert log.count('another image is taken') == 1  # not once for each
    for epoch in (1, 2):
        assert f'epoch {epoch}: 10 images cannot be read, see {tmp_path}/run/unreadable.txt' in log


def test_resumed_run_goes_on_with_its_list_and_a_new_one_does_not(tmp_path):
    bad = make_mixed_folder(tmp_path / 'images', 40, 0.1)
    train(tmp_path / 'images', tmp_path / 'run')
    assert read_list(tmp_path / 'run').keys() == bad.keys()
    first, *others = sorted(bad)
    noise(16, 12).save(first)  # mended
    later = tmp_path / 'images/00001.png'
    later.write_text('text')
    train(tmp_path / 'images', tmp_path / 'run', epochs=2, resume=True)
    assert read_list(tmp_path / 'run').keys() == {*bad, str(later)}
    train(tmp_path / 'images', tmp_path / 'run')
    assert read_list(tmp_path / 'run').keys() == {*others, str(later)}


def test_too_many_end_the_run_with_the_reason(tmp_path):
    make_mixed_folder(tmp_path / 'images', 60, 0.2)
    message = r'\d+ of \d+ images could not be read, more than 10%: .*unreadable.txt names them'
    with pytest.raises(OSError, match=message):
        train(tmp_path / 'images', tmp_path / 'run', hook_patience=20)
    assert len(read_list(tmp_path / 'run')) >= 3
    train(tmp_path / 'images', tmp_path / 'patient')  # not among so few
    train(tmp_path / 'images', tmp_path / 'lenient', hook_patience=20, hook_limit=0.5)


def test_nothing_but_unreadable_images(tmp_path):
    make_mixed_folder(tmp_path / 'images', 4, 1.0)
    message = '1000 images for one batch, the last: cannot read the image .*/images/0000'
    with pytest.raises(OSError, match=message):
        train(tmp_path / 'images', tmp_path / 'run')


def test_no_list_where_all_is_well(tmp_path):
    make_images(tmp_path / 'images', dict(x=9), 4)
    train(tmp_path / 'images', tmp_path / 'run')
    assert not (tmp_path / 'run/unreadable.txt').exists()
