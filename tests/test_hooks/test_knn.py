"""KNNHook in whole runs of a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import ROOT, cae_config, make_images
from mmengine.config import Config
from mmengine.registry import HOOKS, DefaultScope
from mmengine.runner import Runner

from cae_mm.evaluation.encoder import load_encoder
from cae_mm.evaluation.features import extract_features, labelled_images
from cae_mm.evaluation.knn import knn_accuracies
from cae_mm.hooks import KNNHook


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Train and val with 9 and 5 images of each of two classes, noise brighter or darker."""
    root = tmp_path_factory.mktemp('images')
    return {
        split: str(make_images(root / split, dict(dark=150, light=200), count))
        for split, count in (('train', 9), ('val', 5))
    }


def make_config(folders, work_dir, epochs=3, lr=1e-2, hook=None, log_level='WARNING'):
    dataset = dict(
        type='mmpretrain.CustomDataset',
        data_prefix=folders['train'],
        with_label=False,
        pipeline=[
            dict(type='cae_mm.LoadImage'),
            dict(type='cae_mm.TwoViewResizedCrop', size=16, second_size=32),
            dict(type='cae_mm.CAEMaskGenerator', patch_size=4, min_block=2),
            dict(type='mmpretrain.PackInputs'),
        ],
    )
    model = cae_config()
    model['backbone']['drop_path_rate'] = 0.3
    cfg = dict(
        model=model,
        work_dir=str(work_dir),
        default_scope='mmpretrain',
        train_dataloader=dict(
            batch_size=4,
            sampler=dict(type='DefaultSampler', shuffle=True),
            collate_fn=dict(type='default_collate'),
            dataset=dataset,
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=lr)),
        custom_hooks=[],
        randomness=dict(seed=0),
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
        log_level=log_level,
        experiment_name=f'{work_dir.name}{id(work_dir)}',
    )
    if hook is not None:
        cfg['custom_hooks'].append(dict(type='cae_mm.KNNHook', **folders) | hook)
    return Config(cfg)


@pytest.fixture
def train(folders, tmp_path):
    """Trains; returns the Runner and the lines of numbers it logged."""

    def train(name, **options):
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            runner = Runner.from_cfg(make_config(folders, tmp_path / name, **options))
            runner.train()
        return runner, read_lines(tmp_path / name)

    return train


def read_lines(work_dir):
    [file] = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in file.read_text().splitlines()]


def knn_lines(lines):
    return {line['step']: line['knn_top1'] for line in lines if 'knn_top1' in line}


@pytest.mark.filterwarnings('ignore')  # of the Runner
def test_training_is_the_same_with_and_without_the_hook(train):
    without, lines = train('without')
    with_hook, more = train('with', hook=dict(k=3))
    assert [line for line in more if 'knn_top1' not in line][0]['loss'] == lines[0]['loss']
    state, expected = with_hook.model.state_dict(), without.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert with_hook.model.backbone.training


@pytest.mark.filterwarnings('ignore')
def test_accuracy_is_that_of_the_current_encoder(train, folders):
    runner, lines = train('run', epochs=5, hook=dict(k=3, interval=2, batch_size=5))
    logged = knn_lines(lines)
    assert sorted(logged) == [2, 4, 5]  # every second epoch, and the last one

    path = Path(runner.work_dir) / 'epoch_5.pth'
    encoder = load_encoder(runner.cfg, path, features=['mean'])
    data = []
    for folder in folders.values():
        images = labelled_images(folder, (16, 16))
        rows = range(len(images))
        batches = extract_features(encoder, images, rows, batch_size=5, num_workers=0)
        data += torch.cat(list(batches))[:, 0], torch.tensor(images.targets)
    assert logged[5] == pytest.approx(knn_accuracies(*data, ks=[3])[3])


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(k=19), ValueError, 'k = 19 neighbours were asked for, but there are 18 training'),
        (dict(k=6, max_images=5), ValueError, 'k = 6 .* but there are 5 training images'),
        (dict(train='none'), FileNotFoundError, 'none is no labelled folder'),
        (dict(k=3, feature='max'), ValueError, "Unknown feature 'max'"),
        (dict(k=3, precision='int8'), ValueError, "Unknown precision 'int8'"),
    ],
)
def test_mistakes_are_said_before_training(folders, tmp_path, options, error, message):
    runner = Runner.from_cfg(make_config(folders, tmp_path, hook=options))
    with pytest.raises(error, match=message):
        runner.train()
    assert runner.iter == 0


@pytest.mark.filterwarnings('ignore')
def test_training_by_iterations_is_refused(folders, tmp_path):
    cfg = make_config(folders, tmp_path, hook=dict(k=3))
    cfg.train_cfg = dict(by_epoch=False, max_iters=2)
    with pytest.raises(ValueError, match='KNNHook counts epochs: set train_cfg.type'):
        Runner.from_cfg(cfg).train()


@pytest.mark.parametrize('scope', ['mmengine', 'mmpretrain', 'mmseg', 'mmdet'])
def test_hook_is_found_from_every_scope(scope, folders):
    with DefaultScope.overwrite_default_scope(scope):
        assert type(HOOKS.build(dict(type='cae_mm.KNNHook', **folders))) is KNNHook


@pytest.mark.filterwarnings('ignore')
def test_two_processes_share_the_work(train, folders, tmp_path):
    """17 neighbours and 10 images, so that one process has to fill up its share."""
    options = dict(epochs=1, lr=0.0, hook=dict(k=3, max_images=17))  # lr 0: the same encoder
    cfg = make_config(folders, tmp_path / 'two', log_level='INFO', **options)
    cfg.runner_type = 'cae_mm.CAERunner'  # processes on CPUs
    cfg.dump(tmp_path / 'config.py')
    command = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run']
    command += ['--nproc-per-node', '2', '--master-port', str(20000 + os.getpid() % 20000)]
    command += [str(ROOT / 'tools/train.py'), str(tmp_path / 'config.py'), '--launcher', 'pytorch']
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    _, expected = train('one', **options)
    assert knn_lines(read_lines(tmp_path / 'two')) == knn_lines(expected)
    printed = result.stdout + result.stderr
    assert 'Epoch(knn) [1]  knn_top1: ' in printed
    assert printed.count('features for kNN in ') == 1
