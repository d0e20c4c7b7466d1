import json
import multiprocessing
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from builders import cae_config, make_images
from mmengine.config import Config
from PIL import Image

from cae_mm.evaluation.encoder import load_encoder
from cae_mm.evaluation.features import (
    _load_with_processes,
    cached_features,
    central_crop,
    check_same_classes,
    extract_features,
    labelled_images,
    subset_rows,
)

SIZE = (16, 16)
CLASSES = dict(cat=255, dog=255)


@pytest.fixture
def cfg():
    return Config(dict(model=cae_config()))


@pytest.fixture
def encoder(cfg):
    return load(cfg)


def load(cfg, features=('cls', 'mean'), seed=0, precision='float32'):
    return load_encoder(cfg, 'random', features=features, seed=seed, precision=precision)


@pytest.fixture
def images(tmp_path):
    return labelled_images(make_images(tmp_path / 'images', CLASSES, 7), SIZE)


def extract(encoder, images, rows, batch_size=4, num_workers=0):
    options = dict(batch_size=batch_size, num_workers=num_workers)
    return torch.cat(list(extract_features(encoder, images, rows, **options)))


def test_patches_of_chosen_images(encoder, images):
    rows = [5, 0, 13]
    options = dict(batch_size=2, num_workers=0)
    patches = torch.cat([*extract_features(encoder, images, rows, patches=True, **options)])
    expected = encoder.patches(torch.stack([images[row][0] for row in rows]))
    torch.testing.assert_close(patches, expected)


def test_features_do_not_depend_on_batch_and_order(encoder, images):
    """Up to rounding, since matrix products may add up otherwise at other batch sizes."""
    expected = extract(encoder, images, range(14))
    assert expected.shape == (14, 2, 16) and expected.dtype == torch.float32
    for batch_size in (1, 3, 14):
        actual = extract(encoder, images, range(14), batch_size)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    order = torch.randperm(14).tolist()
    torch.testing.assert_close(
        extract(encoder, images, order), expected[order], rtol=1e-5, atol=1e-5
    )


def test_data_workers_change_nothing_and_no_random_number_is_drawn(encoder, images):
    state = torch.get_rng_state()
    expected = extract(encoder, images, range(14))
    actual = extract(encoder, images, range(14), num_workers=2)
    assert torch.equal(actual, expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # it is for GPUs
def test_data_workers_serve_on_when_all_of_a_run_are_told_to_end(images):
    batches = _load_with_processes(images, range(14), 2, num_workers=1)
    first = next(batches)
    [worker] = multiprocessing.active_children()
    subprocess.run(['kill', '-TERM', str(worker.pid)], check=True)  # not by its own process
    assert len(torch.cat([first, *batches])) == 14


def test_workers_fit_the_machine(encoder, images, monkeypatch):
    """Of more workers than cores torch warns, and warnings are errors here."""
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {0})
    extract(encoder, images, range(4), num_workers=None)


def test_crop_is_that_of_the_usual_protocol():
    """Short edge to 256, then the central 224 pixels."""
    columns = np.arange(512)[None, :, None] // 2
    image = Image.fromarray(np.broadcast_to(columns, (512, 512, 3)).astype(np.uint8))
    crop = central_crop(image, (224, 224))
    assert crop.shape == (3, 224, 224) and crop.dtype == torch.uint8
    reference = image.resize((256, 256), Image.Resampling.BICUBIC).crop((16, 16, 240, 240))
    np.testing.assert_array_equal(crop.permute(1, 2, 0).numpy(), np.asarray(reference))


@pytest.mark.parametrize('shape', [(100, 40), (40, 100), (7, 300), (16, 32)])
def test_crop_lies_within_images_of_any_shape(shape):
    """A white image has no black border, which cropping would add outside."""
    crop = central_crop(Image.new('RGB', shape, 'white'), (16, 32))
    assert crop.shape == (3, 16, 32) and int(crop.min()) == 255


def test_channels_are_bgr(tmp_path):
    for name, colour in (('cat', (255, 0, 0)), ('dog', (0, 0, 255))):
        (tmp_path / name).mkdir()
        Image.new('RGB', (20, 20), colour).save(tmp_path / name / 'a.PNG')
    (red, cat), (blue, dog) = labelled_images(tmp_path, SIZE)
    assert (cat, dog) == (0, 1)
    assert red[:, 0, 0].tolist() == [0, 0, 255] and blue[:, 0, 0].tolist() == [255, 0, 0]


class Interrupted(Exception):
    pass


class Cache:
    """A cache and the sizes of the batches that were extracted for it."""

    def __init__(self, folder):
        self.folder, self.extracted = folder, []

    def get(self, encoder, images, stop_after=None):
        def count(_, args):
            if len(self.extracted) == stop_after:
                raise Interrupted
            self.extracted.append(len(args[0]['inputs']))

        self.extracted.clear()
        with encoder.normalizer.register_forward_pre_hook(count):
            return cached_features(self.folder, encoder, images, batch_size=4, num_workers=0)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / 'cache')


def test_interrupted_extraction_goes_on_where_it_was(cache, encoder, images, capsys):
    expected = extract(encoder, images, range(14)).numpy()
    for stop_after in (0, 2, 1):
        with pytest.raises(Interrupted):
            cache.get(encoder, images, stop_after)
    assert capsys.readouterr().out == f'{cache.folder}: 8 of 14 images are in the cache\n'
    actual = cache.get(encoder, images)
    assert cache.extracted == [2]
    capsys.readouterr()
    np.testing.assert_array_equal(actual, expected)
    assert isinstance(actual, np.memmap) and not actual.flags.writeable

    again = cache.get(encoder, images, stop_after=0)
    assert capsys.readouterr().out == f'{cache.folder}: 14 of 14 images are in the cache\n'
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize(
    'part', ['weights', 'backbone', 'images', 'preprocessing', 'features', 'precision']
)
def test_stale_features_are_not_used(cache, cfg, encoder, images, part, capsys):
    cache.get(encoder, images)
    assert capsys.readouterr().out == ''
    if part == 'weights':
        encoder = load(cfg, seed=1)
    elif part == 'backbone':  # weights of the same shapes, but other heads
        cfg.model.backbone.arch.num_heads = 4
        encoder = load(cfg)
    elif part == 'images':
        path = images.samples[3][0]
        Image.new('RGB', (20, 20), 'red').save(path)
        os.utime(path, ns=(1, 1))
    elif part == 'preprocessing':
        cfg.model.data_preprocessor = dict(type='cae_mm.CAEDataPreprocessor', mean=[1, 2, 3])
        encoder = load(cfg)
    elif part == 'features':
        encoder = load(cfg, features=['mean'])
    else:
        encoder = load(cfg, precision='bfloat16')
    actual = cache.get(encoder, images)
    said = f'{cache.folder}/features.npy is of other {part}: extracting anew\n'
    assert capsys.readouterr().out == said
    np.testing.assert_array_equal(actual, extract(encoder, images, range(14)).numpy())
    cache.get(encoder, images, stop_after=0)  # and these are in the cache now


def test_stop_while_replacing_stale_features(cache, cfg, encoder, images):
    """Neither the old nor the new rows are taken for the other's."""
    cache.get(encoder, images)
    other = load(cfg, seed=1)
    with pytest.raises(Interrupted):
        cache.get(other, images, stop_after=1)
    assert json.loads((cache.folder / 'state.json').read_text())['done'] == 4
    actual = cache.get(other, images)
    assert cache.extracted == [4, 4, 2]
    np.testing.assert_array_equal(actual, extract(other, images, range(14)).numpy())


def test_moved_folder_of_images_is_the_same(cache, encoder, images, tmp_path):
    cache.get(encoder, images)
    moved = shutil.move(images.root, tmp_path / 'elsewhere')
    cache.get(encoder, labelled_images(moved, SIZE), stop_after=0)


def test_missing_empty_and_flat_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match='none is no labelled folder: .* one sub-folder'):
        labelled_images(tmp_path / 'none', SIZE)
    flat = make_images(tmp_path / 'data', dict(cat=255), 1) / 'cat'
    with pytest.raises(FileNotFoundError, match="cat is no labelled folder: Couldn't find any"):
        labelled_images(flat, SIZE)
    (tmp_path / 'data/cow').mkdir()
    with pytest.raises(FileNotFoundError, match='data is no labelled folder: .* the classes cow'):
        labelled_images(tmp_path / 'data', SIZE)


def test_folders_of_other_classes(tmp_path):
    train = labelled_images(make_images(tmp_path / 'train', CLASSES, 1), SIZE)
    val = labelled_images(make_images(tmp_path / 'val', CLASSES | dict(cow=255), 1), SIZE)
    check_same_classes(train, train)
    for one, other in ((train, val), (val, train)):
        with pytest.raises(ValueError, match='val and .*train need the same classes, .* 1 .*: cow'):
            check_same_classes(one, other)


def test_subset_is_random_but_always_the_same(images):
    rows = subset_rows(images, 5)
    assert rows == subset_rows(images, 5) == sorted(set(rows)) and len(rows) == 5
    assert rows != list(range(5))
    assert subset_rows(images, None) == subset_rows(images, 99) == list(range(14))
