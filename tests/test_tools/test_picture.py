"""tools/picture.py as a user runs it; the pictures' numbers are tested in test_visualization."""

import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import GRID, ROOT, WIDTH, build_cae, cae_config, make_images, randomize, run_tool
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

from cae_mm.evaluation.encoder import load_encoder
from cae_mm.visualization.components import paint_patches, principal_components, to_colors
from cae_mm.visualization.images import ImageFiles, find_images

PIPELINE = [
    dict(type='cae_mm.LoadImage'),
    dict(type='cae_mm.TwoViewResizedCrop', size=16, second_size=32),
    dict(type='cae_mm.CAEMaskGenerator', patch_size=4, min_block=2),
    dict(type='mmpretrain.PackInputs'),
]
NAMES = ('epoch_3', 'encoder')
CLASSES = dict(dark=60, bright=250)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a config, a checkpoint, its encoder alone, and images of two classes."""
    make_images(tmp_path / 'train', CLASSES, 8)
    make_images(tmp_path / 'val', CLASSES, 3)
    cfg = Config(dict(model=cae_config(), train_dataloader=dict(dataset=dict(pipeline=PIPELINE))))
    cfg.model.target_generator.init_cfg = dict(type='Pretrained', checkpoint='of_nobody.pth')
    cfg.dump(tmp_path / 'config.py')
    model = randomize(build_cae())
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'epoch_3.pth')
    torch.save(model.backbone.state_dict(), tmp_path / 'encoder.pth')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(kind, *options, checkpoint='epoch_3.pth', config='config.py'):
    """Run the tool twice and return the picture, which has to be the same."""
    for out in ('one.png', 'two.png'):
        run_tool('picture.py', kind, config, checkpoint, *options, '--out', out, '--device', 'cpu')
    with Image.open('one.png') as one, Image.open('two.png') as two:
        pixels = np.asarray(one.convert('RGB'))
        assert np.array_equal(pixels, np.asarray(two.convert('RGB')))
    return pixels


def sheet_shape(rows, columns, labels=True, note=True):
    """Pixels of a sheet with titles."""
    return 24 + rows * 164 + (24 if note else 4), (24 if labels else 4) + columns * 164 + 4, 3


@pytest.mark.parametrize('of', ['class', 'regressor'])
def test_attention(work, capsys, of):
    options = ['val', '--count', 2, '--of', of, '--layer', 0, '--against', 'random']
    assert draw('attention', *options).shape == sheet_shape(rows=4, columns=4)
    printed = capsys.readouterr().out
    assert 'epoch_3: the mean over heads attends to' in printed and 'of 4x4 patches' in printed
    assert 'random: the mean' in printed


def test_attention_of_a_probe(work):
    head = dict(type='cae_mm.AttentiveProbeHead', num_classes=2, in_channels=WIDTH, num_heads=2)
    backbone = cae_config()['backbone'] | dict(out_type='raw')
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(type='ImageClassifier', backbone=backbone, head=head),
            data_preprocessor=dict(mean=[1.0] * 3, std=[50.0] * 3, to_rgb=True, num_classes=2),
            test_dataloader=dict(dataset=dict(type='CustomDataset', pipeline=[])),
        )
    )
    cfg.dump('probe.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        torch.save(randomize(MODELS.build(cfg.model)).state_dict(), 'probe.pth')
    options = ['val/dark/0.png', '--of', 'probe', '--size', 32]
    shape = draw('attention', *options, checkpoint='probe.pth', config='probe.py').shape
    assert shape == sheet_shape(rows=1, columns=4)


def test_features_are_painted(work):
    sheet = draw('features', 'val', '--count', 3)
    assert sheet.shape == sheet_shape(rows=3, columns=2, labels=False)
    images = ImageFiles(find_images(['val'], 3, 0), (16, 16))
    encoder = load_encoder(Config.fromfile('config.py'), 'epoch_3.pth', features=['mean'])
    colors = to_colors(principal_components(encoder.patches(images.load()))[0])
    want = paint_patches(colors[1], GRID, (160, 160)).permute(1, 2, 0).numpy()
    found = sheet[24 + 164 : 24 + 164 + 160, 4 + 164 : 4 + 164 + 160] / 255
    np.testing.assert_allclose(found, want, atol=0.005)


def test_an_encoder_alone_is_enough(work):
    whole = draw('features', 'val', '--size', 32)
    alone = draw('features', 'val', '--size', 32, checkpoint='encoder.pth')
    title = slice(0, 24)  # names the file
    assert np.array_equal(np.delete(whole, title, 0), np.delete(alone, title, 0))


def test_patches(work, capsys):
    query = 'train/dark/0.png'
    options = [query, '--among', 'train', '--k', 4, '--patch', 1, 2, '--against', 'encoder.pth']
    assert draw('patches', *options).shape == sheet_shape(rows=2, columns=5, note=False)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    one, other = ([words[1:] for words in printed if words[0] == name] for name in NAMES)
    assert one == other and len(one[0]) == 4
    with pytest.raises(ValueError, match='16 neighbours were asked for, but there are 15 images'):
        draw('patches', query, '--among', 'train', '--k', 16)  # the image itself does not count
    with pytest.raises(ValueError, match='--patch 4 0: there are 4x4 patches'):
        draw('patches', query, '--among', 'train', '--patch', 4, 0)


def test_neighbors(work, capsys):
    options = '--train train --val val --count 2 --k 3 --feature cls --against random'.split()
    assert draw('neighbours', *options).shape == sheet_shape(rows=4, columns=4)
    assert 'epoch_3: ' in (printed := capsys.readouterr().out)
    assert '% of the neighbours are of the right class' in printed


def test_more_neighbors_than_images(work):
    """The encoder is not even looked for."""
    with pytest.raises(ValueError, match='k = 17 .* there are 16 training images: k must be from'):
        draw('neighbours', '--train', 'train', '--val', 'val', '--k', 17, checkpoint='none.pth')


def test_right_and_wrong_neighbors(work, capsys):
    """All nine images are neighbours, eight of them dark; three dark ones ask and a bright one."""
    for folder in ('train', 'val'):
        for path in (work / folder / 'bright').iterdir():
            path.unlink()
        Image.new('RGB', (20, 20), 'white').save(work / folder / 'bright' / '0.png')
    sheet = draw('neighbours', '--train', 'train', '--val', 'val', '--count', 4, '--k', 9)
    corners = sheet[24 : 24 + 4 * 164 : 164, 24 + 164 : 24 + 10 * 164 : 164].astype(int)  # 4 x 9
    count = [
        np.sum(np.abs(corners - color).max(-1) < 3) for color in ([25, 178, 51], [217, 26, 26])
    ]
    assert count == [3 * 8 + 1, 3 * 1 + 8]
    assert f'{25 / 36:.0%} of the neighbours are of the right class' in capsys.readouterr().out


def test_map(work):
    make_images(work / 'more', CLASSES, 20)
    assert draw('map', 'more', '--count', 36, '--against', 'random').shape == (1200, 1200, 3)


def test_a_map_by_umap_is_refused_before_features_are_computed(work, monkeypatch):
    monkeypatch.setitem(sys.modules, 'umap', None)
    with pytest.raises(ImportError, match='needs its package: pip install umap-learn'):
        draw('map', 'nowhere', '--method', 'umap')


def test_a_map_by_umap_has_the_seed(work, monkeypatch):
    """umap-learn itself is tested where a process compiles it: in test_maps.py."""
    seen = []

    def UMAP(random_state, **options):
        seen.append(random_state)
        return SimpleNamespace(fit_transform=lambda features: features[:, :2])

    monkeypatch.setitem(sys.modules, 'umap', SimpleNamespace(UMAP=UMAP))
    make_images(work / 'more', CLASSES, 20)
    draw('map', 'more', '--count', 36, '--method', 'umap', '--seed', 5)
    assert seen == [5, 5]  # drawn twice


def test_models_of_other_numbers_of_heads(work):
    """Each row has what its model has: mean and heads; what is right of it is white."""
    arch = dict(embed_dims=WIDTH, depth=2, num_heads=4, layer_scale=0.1)
    model = cae_config(backbone=dict(arch=arch))
    cfg = Config(dict(model=model, train_dataloader=dict(dataset=dict(pipeline=PIPELINE))))
    cfg.dump('other.py')
    options = ['val/dark/0.png', '--against', 'other.py', 'random']
    sheet = draw('attention', *options)
    assert sheet.shape == sheet_shape(rows=2, columns=6)
    places = [slice(24 + 164 * i, 24 + 164 * i + 160) for i in range(6)]
    white = [[(sheet[row, column] == 255).all() for column in places] for row in places[:2]]
    assert white == [[False] * 4 + [True] * 2, [False] * 6]
    titles = [(sheet[:24, column] < 128).any() for column in places]
    assert titles == [False] + [True] * 5
    other_way_round = draw('attention', *options[:2], 'config.py', 'epoch_3.pth', config='other.py')
    assert other_way_round.shape == sheet.shape


@pytest.mark.parametrize(
    ('one', 'other', 'names'),
    [
        ('a/run/epoch_3.pth', 'b/run/epoch_3.pth', ['a', 'b']),
        ('a/epoch_3.pth', 'b/epoch_9.pth', ['a', 'b']),
        ('a/epoch_3.pth', 'a/epoch_9.pth', ['epoch_3', 'epoch_9']),
        ('a/epoch_3.pth', 'random', ['epoch_3', 'random']),
        ('a/epoch_3.pth', 'a/epoch_3.safetensors', ['epoch_3.pth', 'epoch_3.safetensors']),
        ('a.py random', 'b.py random', ['a.py', 'b.py']),
        ('a.py random', 'a.py random', ['random 1', 'random 2']),
    ],
)
def test_names_tell_models_apart(one, other, names):
    name_models = runpy.run_path(str(ROOT / 'tools/picture.py'))['name_models']
    files = [(['config.py'] + text.split())[-2:] for text in (one, other)]
    assert name_models([(SimpleNamespace(filename=cfg), file) for cfg, file in files]) == names


def test_two_runs_with_files_of_one_name(work, capsys):
    other = work / 'other'
    other.mkdir()
    (work / 'epoch_3.pth').rename(other / 'epoch_3.pth')
    torch.save(build_cae().state_dict(), work / 'epoch_3.pth')
    draw('attention', 'val', '--count', 1, '--against', 'config.py', 'other/epoch_3.pth')
    assert 'other: the mean' in (printed := capsys.readouterr().out)
    assert f'{work.name}: the mean' in printed


def test_only_reconstruction_needs_the_tokenizer(work):
    with pytest.raises(FileNotFoundError, match='no weights for DiscreteVAE at .*of_nobody.pth'):
        draw('reconstruct', 'val')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['features', '--count', 0], 'argument --count: must be at least 1, not 0'),
        (['map', '--count', -3], 'argument --count: must be at least 1, not -3'),
        (['attention', '--size', 0], 'argument --size: must be at least 1, not 0'),
        (['patches', '--k', 0], 'argument --k: must be at least 1, not 0'),
        (['attention', '--patch', 0, 0], 'attention --of class takes no --patch'),
        (['attention', '--of', 'probe', '--layer', 1], 'attention --of probe takes no --layer'),
        (['attention', '--of', 'regressor', '--size', 64], '--of regressor takes no --size'),
        (['features', '--out', 'x.jpg'], 'argument --out: pictures are PNG files, x.jpg does not'),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message, capsys):
    kind, *options = options
    with pytest.raises(SystemExit):
        run_tool('picture.py', kind, 'config.py', 'random', 'val', *options)
    assert message in capsys.readouterr().err


def test_the_patch_needs_its_image_and_others(work):
    with pytest.raises(FileNotFoundError, match='missing.png: no such image'):
        draw('patches', 'missing.png', '--among', 'val')
    with pytest.raises(ValueError, match='--among has no image but val/dark/0.png itself'):
        draw('patches', 'val/dark/0.png', '--among', 'val/dark/0.png')


def test_against_takes_two_words(work):
    with pytest.raises(ValueError, match=r'--against takes \[CONFIG\] CHECKPOINT, not a b c'):
        draw('features', 'val', '--against', 'a', 'b', 'c')
