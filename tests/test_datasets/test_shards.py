"""Shards are the folder they were made of: each image once an epoch, whoever reads them."""

import io
import logging
import os
import pickle
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from builders import ROOT, make_images, run_tool
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, RUNNERS
from mmengine.runner import Runner
from PIL import Image

from cae_mm.datasets import LoadImage, ShardDataset, ShardSampler
from cae_mm.datasets import shards as shards_module
from cae_mm.datasets.shard_index import EXTENSIONS, INDEX_FILE, load_index, split_name

CONFIG = ROOT / 'configs/_base_/datasets/in1k_two-view_224.py'
LOADER = dict(
    batch_size=2,
    num_workers=2,
    collate_fn=dict(type='pseudo_collate'),
    drop_last=False,
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('folder'), dict(ant=100, bee=256), 8)


@pytest.fixture(scope='module')
def shards(folder, tmp_path_factory):
    """16 images of about 1.5 kB, three or four a shard."""
    out = tmp_path_factory.mktemp('shards')
    run_tool('make_shards.py', folder, out, '--shard-mb', 0.005)
    return out


def dataset(root, on_error='raise', **options):
    return ShardDataset(str(root), pipeline=[LoadImage(on_error)], **options)


def key(path):
    """Of a file or a member: class and name."""
    return '/'.join(Path(path).parts[-2:])


def keys(folder):
    return sorted(key(path) for path in folder.rglob('*.png'))


def sampler(monkeypatch, data, rank=0, processes=1, epoch=0, **options):
    monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', lambda: (rank, processes))
    made = ShardSampler(data, **dict(seed=3) | options)
    made.set_epoch(epoch)
    return made


def read_epoch(monkeypatch, root, epoch, processes=2):
    """Keys that each process reads in an epoch, in their order, with two workers each."""
    for rank in range(processes):
        data = dataset(root)
        order = sampler(monkeypatch, data, rank, processes, epoch)
        loader = Runner.build_dataloader(dict(LOADER, dataset=data, sampler=order))
        yield [key(path) for batch in loader for path in batch['img_path']]


@pytest.mark.filterwarnings('ignore:This DataLoader will create')  # on one core
def test_epochs_of_two_processes_with_two_workers_are_the_folder(folder, shards, monkeypatch):
    assert len(list(shards.glob('*.tar'))) > 3
    epochs = [list(read_epoch(monkeypatch, shards, epoch)) for epoch in range(3)]
    for one, other in epochs:
        assert len(one) == len(other) == 8
        assert sorted(one + other) == keys(folder)
    assert len({tuple(one) for one, _ in epochs}) == 3  # another order each time
    assert len({frozenset(one) for one, _ in epochs}) == 3  # and other images for each process
    assert list(read_epoch(monkeypatch, shards, 2)) == epochs[2]  # whatever was read before


def test_images_are_those_of_the_folder(folder, shards):
    data = dataset(shards, with_label=True)
    assert data.metainfo['classes'] == ('ant', 'bee')
    assert len(data) == 16
    for sample in data:
        name = key(sample['img_path'])
        np.testing.assert_array_equal(
            sample['img'], LoadImage()(dict(img_path=str(folder / name)))['img']
        )
        assert sample['gt_label'] == ['ant', 'bee'].index(name.split('/')[0])
    assert data[-1]['sample_idx'] == 15
    assert 'gt_label' not in dataset(shards)[0]


class Stub:
    """Images of shards, as many in each as ``sizes`` says; by default 50."""

    def __init__(self, count, sizes=None):
        self.data_list = np.zeros(count, dtype=[('shard', 'i4')])
        sizes = sizes or [50] * (count // 50 + 1)
        self.data_list['shard'] = np.arange(len(sizes)).repeat(sizes)[:count]

    def __len__(self):
        return len(self.data_list)

    def __getitem__(self, index):
        return index


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    processes=st.integers(1, 9),
    batch=st.integers(1, 5),
    span=st.integers(1, 100),
    epoch=st.integers(0, 1000),
    seed=st.integers(0, 2**31 - 1),
)
def test_each_image_comes_once_whoever_reads(sizes, processes, batch, span, epoch, seed):
    """But for those that fill up the last round; an epoch's order is always the same."""

    def read():
        for rank in range(processes):
            with pytest.MonkeyPatch.context() as patch:
                order = sampler(patch, data, rank, processes, epoch, span=span, seed=seed)
            loader = torch.utils.data.DataLoader(data, batch, sampler=order)
            yield [index for indices in loader for index in indices.tolist()]

    data = Stub(sum(sizes), sizes)
    parts = list(read())
    assert len({len(part) for part in parts}) == 1  # or processes would wait for each other
    times = Counter(index for part in parts for index in part)
    assert sorted(times) == list(range(len(data)))
    assert sum(times.values()) - len(data) == -len(data) % processes
    assert list(read()) == parts


def test_only_images_nearer_than_the_span_swap(monkeypatch):
    order = list(sampler(monkeypatch, Stub(2000), span=120))
    plain = list(sampler(monkeypatch, Stub(2000), span=1))
    blocks = [{index // 50 for index in plain[i : i + 50]} for i in range(0, 2000, 50)]
    assert all(len(block) == 1 for block in blocks)  # shard by shard
    assert len(set.union(*blocks)) == 40 and plain != sorted(plain)
    place = {index: i for i, index in enumerate(plain)}
    places = np.array([place[index] for index in order])
    first = np.minimum.accumulate(places[::-1])[::-1]  # the first image still to come
    assert 60 < (np.maximum.accumulate(places) - first).max() < 120
    assert np.corrcoef(places[:-1], places[1:])[0, 1] < 0.9999  # neighbours are parted
    with pytest.raises(ValueError, match='span must be at least 1 image, not 0'):
        sampler(monkeypatch, Stub(2), span=0)


def test_processes_read_other_shards(monkeypatch):
    parts = [set(sampler(monkeypatch, Stub(2000), i, 4, span=100)) for i in range(4)]
    held = [{index // 50 for index in part} for part in parts]
    assert sum(map(len, held)) <= 40 + 3


def test_few_images_are_shuffled_completely(monkeypatch):
    """Each image comes anywhere, equally often."""
    data = Stub(10)
    firsts = Counter(next(iter(sampler(monkeypatch, data, epoch=i))) for i in range(1000))
    assert min(firsts.values()) > 60 and len(firsts) == 10


@MODELS.register_module()
class ShardToy(BaseModel):
    """Keeps what it saw: names and the means of augmented images."""

    seen: list = []

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs, data_samples, mode='tensor'):
        self.seen += [
            (sample.img_path, float(image.float().mean()), int(sample.mask.sum()))
            for image, sample in zip(inputs[0], data_samples, strict=True)
        ]
        return dict(loss=self.weight.square().sum())


@pytest.mark.usefixtures('plain_config_text')
def test_resumed_training_sees_what_an_uninterrupted_one_does(folder, shards, tmp_path):
    crop = dict(TwoViewResizedCrop=dict(size=32, second_size=None))

    def train(**changes):
        ShardToy.seen = []
        cfg = Config.fromfile(CONFIG)
        cfg.merge_from_dict(
            dict(
                runner_type='cae_mm.CAERunner',
                default_scope='mmpretrain',
                model=dict(type='ShardToy'),
                work_dir=str(tmp_path),
                experiment_name=f'{tmp_path.name} {len(changes)}',  # its own, not the second's
                settings=dict(shards=str(shards), batch_size=4, transforms=crop),
                optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
                train_cfg=dict(by_epoch=True, max_epochs=4),
                default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
                randomness=dict(seed=1),
                **changes,
            )
        )
        cfg.train_dataloader.num_workers = 2
        RUNNERS.build(cfg).train()
        return ShardToy.seen

    whole = train()
    assert len(whole) == 4 * 16 and len(set(whole)) == 4 * 16
    for epoch in range(4):
        names = [key(name) for name, *_ in whole[epoch * 16 : epoch * 16 + 16]]
        assert sorted(names) == keys(folder)
    assert train(load_from=str(tmp_path / 'epoch_2.pth'), resume=True) == whole[32:]


# webdataset's
@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
def test_webdataset_reads_our_shards(folder, shards):
    paths = sorted(str(path) for path in shards.glob('*.tar'))
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert sorted(f'{sample["__key__"]}.png' for sample in samples) == keys(folder)
    for sample in samples:
        name = sample['__key__']
        assert sample['png'] == (folder / f'{name}.png').read_bytes()
        assert int(sample['cls']) == ['ant', 'bee'].index(name.split('/')[0])


def png(shade):
    stream = io.BytesIO()
    Image.new('RGB', (9, 8), (shade, 0, 0)).save(stream, 'PNG')
    return stream.getvalue()


def write_shard(path, count=3, start=0, **others):
    """By webdataset; image ``i`` is named ``i`` and has the shade ``i``."""
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(start, start + count):
            writer.write({'__key__': f'x/{i}', 'png': png(i), **others})
    return path


def shades(data):
    return [int(sample['img'][0, 0, 2]) for sample in data]


def test_shards_of_webdataset_need_no_index(tmp_path):
    pattern = str(tmp_path / 'train-%02d.tar')
    with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as writer:
        for i in range(7):
            writer.write({'__key__': f'{i:03}', 'png': png(i), 'cls': i % 2, 'json': dict(a=1)})
    for _ in range(2):  # with the index that the first has left behind
        data = dataset(tmp_path, with_label=True)
        assert shades(data) == list(range(7))
        assert [sample['gt_label'] for sample in data] == [0, 1, 0, 1, 0, 1, 0]
        assert data[6]['img_path'] == f'{tmp_path}/train-02.tar/006.png'
        assert (tmp_path / INDEX_FILE).is_file()


def test_shards_of_the_tar_command(tmp_path, log):
    """Long names, upper case, links, hidden files, and images that are none to webdataset."""
    source = tmp_path / 'files' / ('d.' + 'x' * 120)
    source.mkdir(parents=True)
    for i, name in enumerate(['a.PNG', 'ä' * 70 + '.png', '._a.png', 'a.seg.png', 'notes.txt']):
        (source / name).write_bytes(png(i))
    (source / 'link.png').symlink_to('a.PNG')
    command = ['tar', '-cf', tmp_path / 'all.tar', '-C', tmp_path / 'files', '.']
    subprocess.run(command, check=True)
    assert sorted(shades(dataset(tmp_path))) == [0, 1]
    [record] = log.records
    assert 'all.tar: 1 images have a further dot in their names' in record.getMessage()


@pytest.mark.parametrize(
    ('name', 'parts'),
    [
        ('a/b.jpg', ('a/b', '.jpg')),
        ('a.b/c.d.JPG', ('a.b/c', '.d.jpg')),
        ('./x.tar/y.png', ('./x.tar/y', '.png')),
        ('.jpg', ('', '')),
        ('a/b', ('', '')),
    ],
)
def test_names_are_split_as_by_webdataset(name, parts):
    assert split_name(name) == parts
    base, ending = webdataset.tariterators.base_plus_ext(name)
    assert (base or '', f'.{ending.lower()}' if ending else '') == parts


def test_index_is_made_anew_when_shards_change(tmp_path, log):
    write_shard(tmp_path / 'a.tar')
    assert shades(dataset(tmp_path)) == [0, 1, 2]
    write_shard(tmp_path / 'b.tar', start=3)
    assert shades(dataset(tmp_path)) == [0, 1, 2, 3, 4, 5]
    size = (tmp_path / 'a.tar').stat().st_size
    write_shard(tmp_path / 'a.tar', start=7)
    assert (tmp_path / 'a.tar').stat().st_size == size  # only its time tells
    future = (tmp_path / INDEX_FILE).stat().st_mtime + 10
    os.utime(tmp_path / 'a.tar', (future, future))
    assert shades(dataset(tmp_path)) == [7, 8, 9, 3, 4, 5]
    (tmp_path / INDEX_FILE).unlink()
    (tmp_path / INDEX_FILE).mkdir()
    assert shades(dataset(tmp_path)) == [7, 8, 9, 3, 4, 5]
    [record] = log.records
    assert f'{INDEX_FILE} cannot be written' in record.getMessage()


def test_open_files_are_few_and_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, 'MAX_OPEN', 2)
    for i in range(4):
        write_shard(tmp_path / f'{i}.tar', 2, start=2 * i)
    data = dataset(tmp_path)
    before = len(os.listdir('/proc/self/fd'))
    assert shades(data) == list(range(8)) == shades(data)
    assert len(os.listdir('/proc/self/fd')) - before == 2
    other = pickle.loads(pickle.dumps(data))  # as for workers that are spawned
    assert other.files.opened == {}
    assert shades(other) == list(range(8))
    del data, other
    assert len(os.listdir('/proc/self/fd')) == before


def cut(path, where):
    """Damage the second of three images, or its header."""
    with_index = load_index(path.parent).images
    (path.parent / INDEX_FILE).unlink()
    content, second = path.read_bytes(), int(with_index['offset'][1])
    if where == 'content':
        content = content[: second + 20]
    elif where == 'header':
        content = content[: second - 300]
    elif where == 'end':
        content = content[: second - 512]
    else:
        content = content[: second - 512] + b'#' * 512 + content[second:]
    path.write_bytes(content)


@pytest.mark.parametrize(
    ('where', 'words'),
    [
        ('content', 'cut short in x/1.png'),
        ('header', 'cut short or damaged after x/0.png'),
        ('end', 'cut short or damaged after x/0.png'),
        ('damage', 'cut short or damaged after x/0.png'),
    ],
)
def test_broken_shard_is_named_with_its_key(tmp_path, where, words, log):
    path = write_shard(tmp_path / 'bad.tar')
    write_shard(tmp_path / 'good.tar', start=10)
    cut(path, where)
    way_out = 'Copy or write it anew, or train_dataloader.dataset.skip_broken=True'
    with pytest.raises(ValueError, match=rf'{path} is {words}\. {way_out}'):
        dataset(tmp_path)
    for _ in range(2):  # each time: such an index is not kept
        assert shades(dataset(tmp_path, skip_broken=True)) == [0, 10, 11, 12]
    assert [r.levelno for r in log.records] == [logging.WARNING] * 2
    assert f'{path} is {words}. What is whole is taken' in log.records[-1].getMessage()


def test_file_that_is_no_tar(tmp_path):
    (tmp_path / 'a.tar').write_bytes(b'\x1f\x8b' + bytes(2000))
    with pytest.raises(ValueError, match=f'{tmp_path}/a.tar is no uncompressed tar file'):
        dataset(tmp_path)
    (tmp_path / 'a.tar').write_bytes(b'')
    with pytest.raises(ValueError, match=f'{tmp_path}/a.tar is no uncompressed tar file'):
        dataset(tmp_path)


def test_folder_without_shards_or_images(tmp_path):
    message = rf'no \*.tar in {tmp_path}: .*make_shards.py .* settings.data_root'
    with pytest.raises(FileNotFoundError, match=message):
        dataset(tmp_path)
    with webdataset.TarWriter(str(tmp_path / 'a.tar')) as writer:
        writer.write({'__key__': 'a', 'txt': 'b'})
    with pytest.raises(ValueError, match=f'no images in the shards of {tmp_path}'):
        dataset(tmp_path)


def test_labels_that_are_missing_or_none(tmp_path):
    path = write_shard(tmp_path / 'a.tar')
    with pytest.raises(ValueError, match=f'3 images have no label, {path}/x/0.png is the first'):
        dataset(tmp_path, with_label=True)
    write_shard(path, cls='cat')
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(ValueError, match=f"{path}/x/0.cls holds b'cat', not the number"):
        dataset(tmp_path, with_label=True)


def test_undecodable_image_is_named_with_shard_and_key(tmp_path, log):
    with webdataset.TarWriter(str(tmp_path / 'a.tar')) as writer:
        writer.write({'__key__': 'bad', 'png': b'<html>'})
        writer.write({'__key__': 'good', 'png': png(5)})
    with pytest.raises(OSError, match=f'cannot read the image {tmp_path}/a.tar/bad.png: no image'):
        dataset(tmp_path)[0]
    np.random.seed(0)
    assert shades(dataset(tmp_path, 'skip')) == [5, 5]  # another one is drawn
    assert f'cannot read the image {tmp_path}/a.tar/bad.png' in log.records[0].getMessage()


def test_shard_that_goes_away_is_named(tmp_path):
    path = write_shard(tmp_path / 'a.tar')
    data = dataset(tmp_path)
    path.unlink()
    with pytest.raises(OSError, match=f'cannot read {path}/x/1.png: .*No such file'):
        data[1]


def test_shards_have_the_images_that_a_folder_has():
    """The same endings, so that shards made of a folder leave nothing out."""
    assert Config.fromfile(CONFIG).train_dataloader.dataset.extensions == EXTENSIONS


def test_dataset_builds_from_a_config(shards):
    data = DATASETS.build(dict(type='cae_mm.ShardDataset', data_root=str(shards)))
    assert isinstance(data, ShardDataset) and len(data) == 16


def test_names_that_are_not_utf8(tmp_path):
    """Tarfile gives their bytes as surrogates, as os.listdir does."""
    source = make_images(tmp_path / 'source', {'x': 9}, 1)
    os.rename(source / 'x/0.png', os.fsencode(source) + b'/x/caf\xe9.png')
    run_tool('make_shards.py', source, tmp_path / 'out')
    for _ in range(2):  # the second time from the index
        [sample] = dataset(tmp_path / 'out')
        assert os.fsencode(sample['img_path']).endswith(b'000000.tar/x/caf\xe9.png')


@pytest.mark.parametrize('column', ['shard', 'offset', 'size'])
@pytest.mark.parametrize('value', [-1, 2**31 - 1])
def test_an_index_from_elsewhere_names_no_place_outside(folder, tmp_path, column, value):
    run_tool('make_shards.py', folder, tmp_path / 'out', '--shard-mb', 0.005)
    index = load_index(tmp_path / 'out')
    index.images[column][3] = value
    np.savez(tmp_path / 'out' / INDEX_FILE, **index._asdict())
    with pytest.raises(
        ValueError, match=f'{INDEX_FILE} names places outside the shards: remove it'
    ):
        load_index(tmp_path / 'out')


@pytest.mark.parametrize('damage', ['text', 'packed', 'pickled'])
def test_a_damaged_index_is_named(folder, tmp_path, damage):
    run_tool('make_shards.py', folder, tmp_path / 'out', '--shard-mb', 0.005)
    file, index = tmp_path / 'out' / INDEX_FILE, load_index(tmp_path / 'out')
    if damage == 'text':
        file.write_text('PK')
    elif damage == 'packed':  # a few kB that would become as much as they say
        np.savez_compressed(file, **index._asdict())
    else:
        np.savez(file, shards=index.shards, images=index.images.astype(object))
    with pytest.raises(ValueError, match=f'{INDEX_FILE} is damaged: remove it, it is made anew'):
        load_index(tmp_path / 'out')


@pytest.mark.parametrize('label', [b'-1', b'2147483648', b'1' * 30, b'cat'])
def test_labels_are_numbers_of_classes(tmp_path, label):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        for name, data in (('a.jpg', b'x'), ('a.cls', label)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match='a.tar/a.cls holds .*, not the number of a class'):
        load_index(tmp_path)
