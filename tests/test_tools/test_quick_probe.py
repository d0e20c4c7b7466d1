"""tools/quick_probe.py as a user runs it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import GRID, build_cae, cae_config, make_images, run_tool
from mmengine.config import Config

from cae_mm.evaluation import attentive, linear

CLASSES = dict(a=60, b=150, c=250)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a config, a checkpoint, and images of three classes, noise of a brightness."""
    make_images(tmp_path / 'train', CLASSES, 10)
    make_images(tmp_path / 'val', CLASSES, 4)
    Config(dict(model=cae_config())).dump(tmp_path / 'config.py')
    torch.save(dict(state_dict=build_cae().state_dict()), tmp_path / 'epoch_3.pth')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(linear, 'CS', (1e-2, 1.0))
    return tmp_path


def probe(checkpoint='epoch_3.pth', *options):
    """Run the tool with more options; later ones win."""
    common = '--train train --val val --num-workers 0 --device cpu --epochs 3'.split()
    run_tool('quick_probe.py', 'config.py', checkpoint, *common, *options)


def read_results(folder):
    return json.loads((folder / 'results.json').read_text())


def test_table_and_json(work, capsys):
    probe('epoch_3.pth', '--out', 'out', '--precision', 'float32')
    report = read_results(work / 'out')
    assert report['images'] == {'train': 30, 'val': 12}
    assert report['classes'] == ['a', 'b', 'c'] and report['seed'] == 0
    assert report['chance'] == report['largest_class'] == pytest.approx(1 / 3)
    assert report['checkpoint'] == 'epoch_3.pth' and report['config'] == 'config.py'
    assert report['precision'] == 'float32'
    printed = capsys.readouterr().out
    assert printed.count('features in float32: as the') == 1
    assert '30 training and 12 validation' in printed.replace('\n', ' ')
    for feature in ('cls', 'mean'):
        results = report['results'][feature]
        assert set(results) == {'knn', 'logreg', 'linear'}
        assert set(results['knn']) == {'10', '20'}
        assert set(results['logreg']) == {'C', 'accuracy', 'held_out', 'not_converged'}
        rates = {str(rate) for rate in linear.LEARNING_RATES}
        assert set(results['linear']['held_out']) == set(results['linear']['val']) == rates
        for accuracy in (*results['knn'].values(), results['linear']['accuracy']):
            assert 0 <= accuracy <= 1 and f'{accuracy:.1%}' in printed
    assert report['results']['mean']['logreg']['accuracy'] > 0.9  # brightness is easy to see


def test_second_run_takes_features_from_the_cache(work, capsys):
    probe('epoch_3.pth', '--out', 'out')
    first = read_results(work / 'out')
    capsys.readouterr()
    probe('epoch_3.pth', '--out', 'out')
    assert 'out/train: 30 of 30 images are in the cache' in capsys.readouterr().out
    assert read_results(work / 'out') == first


def test_random_encoder_has_its_own_folder_for_each_seed(work):
    options = ('--probes', 'knn', '--k', '3', '--feature', 'mean')
    for seed in ('1', '2'):
        probe('random', '--seed', seed, *options)
    arrays = []
    for seed in (1, 2):
        folder = work / f'work_dirs/quick_probe/config_random-{seed}'
        assert set(read_results(folder)['results']['mean']['knn']) == {'3'}
        arrays.append(np.load(folder / 'train/features.npy'))
    assert arrays[0].shape == (30, 1, 16) and (arrays[0] != arrays[1]).any()


def test_config_options_count(work):
    with pytest.raises(ValueError, match='of another shape'):
        probe('epoch_3.pth', '--cfg-options', 'model.backbone.patch_size=8')


@pytest.mark.parametrize(
    ('checkpoint', 'options', 'error', 'message'),
    [
        ('epoch_3.pth', ['--train', 'none'], FileNotFoundError, 'none is no labelled folder'),
        ('epoch_3.pth', ['--val', 'val/a'], FileNotFoundError, 'val/a is no labelled folder'),
        ('epoch_3.pth', ['--k', '31'], ValueError, 'k = 31 .* but there are 30 training images'),
        ('none.pth', [], FileNotFoundError, 'no weights for CAEViT at'),
        ('epoch_3.pth', ['--prefix', 'encoder.'], ValueError, r"prefix='backbone\.'"),
    ],
)
def test_mistakes_are_said_before_any_work(work, checkpoint, options, error, message):
    with pytest.raises(error, match=message):
        probe(checkpoint, *options)
    assert not (work / 'work_dirs').exists()


def test_classes_must_be_the_same_and_large_enough(work):
    (work / 'val/a').rename(work / 'val/z')
    with pytest.raises(ValueError, match='train and val need the same classes.*: a'):
        probe()
    (work / 'val/z').rename(work / 'val/a')
    for path in list((work / 'train/b').iterdir())[1:]:
        path.unlink()
    with pytest.raises(ValueError, match='fewer than two training images: b'):
        probe()
    probe('epoch_3.pth', '--probes', 'knn')


def test_attentive_probe_reads_patches(work, capsys):
    probe('epoch_3.pth', '--out', 'out', '--probes', 'attentive')
    report = read_results(work / 'out')
    assert set(report['results']) == {'patches'}
    result = report['results']['patches']['attentive']
    assert {str(rate) for rate in attentive.LEARNING_RATES} == set(result['held_out'])
    assert f'{result["accuracy"]:.1%}' in capsys.readouterr().out
    tokens = np.load(work / 'out/train_patches/features.npy')
    probe('epoch_3.pth', '--out', 'out', '--probes', 'knn', '--feature', 'mean')
    assert tokens.shape == (30, GRID[0] * GRID[1], 16)
    means = np.load(work / 'out/train/features.npy')[:, 0]
    np.testing.assert_allclose(tokens.mean(1), means, atol=1e-5)


def test_features_without_room_are_refused(work, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda _: SimpleNamespace(free=100))
    with pytest.raises(OSError, match='features take 0.0 GB more, 0.0 GB are free: .*--out'):
        probe('epoch_3.pth', '--out', 'out', '--probes', 'knn')


@pytest.mark.parametrize('device', ['gpu', 'cuda:99'])
def test_unusable_device(work, capsys, device):
    with pytest.raises(SystemExit):
        probe('epoch_3.pth', '--device', device)
    assert f'--device: {device} cannot be used here' in capsys.readouterr().err
    assert not (work / 'work_dirs').exists()
