"""Data that is not as a run needs it is named before the run; so is what ends a data worker."""

import os
import signal
import time
from threading import Timer

import pytest
from builders import make_images
from data_runs import data_config
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS, DefaultScope
from mmpretrain.datasets import CustomDataset
from torch.utils.data import DataLoader

from cae_mm.engine import CAERunner
from cae_mm.engine.data import check_datasets, explained_worker_faults, read_categories
from cae_mm.engine.fitting import fit_config


@TRANSFORMS.register_module()
class Fault(BaseTransform):
    """Does something bad to the worker that reads image 3.png."""

    def __init__(self, kind):
        self.kind = kind

    def transform(self, results):
        if results['img_path'].endswith('3.png'):
            if self.kind == 'stall':
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(60)
            elif self.kind == 'kill':
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                os._exit(7)
        return results


def check(root, **dataset):
    cfg = data_config(root, root, dataset=dataset)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return check_datasets(cfg)


@pytest.fixture
def images(tmp_path):
    """Six images in two folders."""
    return make_images(tmp_path / 'images', dict(ant=100, bee=256), 3)


def test_good_data(images):
    (images / 'list.txt').write_text('ant/0.png\nbée.png\n')
    assert check(images) == check(images, with_label=True) == []
    assert check(images, ann_file='list.txt') == []  # what is in it is not looked for


@pytest.mark.parametrize(
    'links',
    [
        {'ant/loop': '..'},
        {'ant/self': '.'},
        {'up': '../..'},  # above the folder
        {'ant/x': '../bee', 'bee/y': '../ant'},  # one leads to the other: paths without end
    ],
)
def test_link_that_leads_back_is_named(images, links):
    for name, target in links.items():
        (images / name).symlink_to(target)
    names = '|'.join(name.partition('/')[2] or name for name in links)
    with pytest.raises(ValueError, match=f'{images}/.*({names}) links to .*Remove the link'):
        check(images)


def test_links_that_lead_elsewhere_are_fine(images, tmp_path):
    other = make_images(tmp_path / 'other', dict(cat=50), 1)
    (images / 'link').symlink_to(other)
    (images / 'ant' / 'again').symlink_to(images / 'bee')
    (images / 'ant' / 'gone.png').symlink_to('nowhere')  # not listed
    assert check(images) == []
    data = CustomDataset(str(images), with_label=False)
    assert len(data) == 6 + 1 + 3


@pytest.mark.parametrize('label', [True, False])
def test_folder_without_images(tmp_path, label):
    (tmp_path / 'a').mkdir()
    for name in ('notes.txt', 'image.tiff'):
        (tmp_path / 'a' / name).touch()
    message = f'no images in {tmp_path}: none of 2 files ends with .jpg, .png. Set settings.data_ro'
    with pytest.raises(FileNotFoundError, match=message):
        check(tmp_path, extensions=['.jpg', '.png'], with_label=label)
    with pytest.raises(FileNotFoundError, match=f'no folder {tmp_path}/train: set settings.data_'):
        check(tmp_path, data_prefix='train')


def test_class_folder_without_images_stays_a_class(images):
    """Mmpretrain warns of it in the log; numbers of classes do not depend on what is missing."""
    (images / 'bat').mkdir()
    assert check(images, with_label=True) == []
    data = CustomDataset(str(images))
    assert data.metainfo['classes'] == ('ant', 'bat', 'bee')
    assert [data.get_data_info(i)['gt_label'] for i in range(6)] == [0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (None, 'no list at .*list.txt: set ann_file'),
        (b'', 'list.txt is empty'),
        (b'ant/caf\xe9.png\n', 'list.txt is no text in UTF-8: .*byte 0xe9 in position 7'),
    ],
)
def test_lists(images, content, message):
    if content is not None:
        (images / 'list.txt').write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        check(images, ann_file='list.txt')


def test_categories_are_found_in_a_large_file(tmp_path):
    path = tmp_path / 'a.json'
    names = '[{"id": 3, "name": "caf\\u00e9"}, {"name": "b]"}]'
    path.write_text(f'{{"images": [{"1, " * 10**5}1], "categories" :\n {names}, "info": {{}}}}')
    assert read_categories(str(path)) == ['café', 'b]']
    path.write_text(path.read_text()[:1000])
    with pytest.raises(ValueError, match=f'{path} has no categories: no COCO file, or one that'):
        read_categories(str(path))


def test_fewer_images_than_a_batch(images, tmp_path):
    cfg = data_config(images, tmp_path / 'run', batch_size=7)
    message = (
        '6 images are 6 a process, less than a batch: with drop_last no iteration is left: set '
        'train_dataloader.batch_size=6 or less, or train_dataloader.drop_last=False'
    )
    with pytest.raises(ValueError, match=message):
        CAERunner.from_cfg(cfg).train()
    cfg.train_dataloader.drop_last = False
    cfg.experiment_name = 'again'
    assert CAERunner.from_cfg(cfg).train().weight < 1


def test_workers_are_not_waited_for_for_ever(tmp_path):
    cfg = data_config(tmp_path, tmp_path, num_workers=1)
    cfg.val_dataloader = dict(cfg.train_dataloader, timeout=7)
    cfg.test_dataloader = dict(cfg.train_dataloader, num_workers=0, timeout=7)
    fit_config(cfg)
    timeouts = [cfg[f'{name}_dataloader'].timeout for name in ('train', 'val', 'test')]
    assert timeouts == [300, 7, 0]  # torch refuses one without workers


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('stall', r'no batch in time\. .* train_dataloader\.timeout=SECONDS .*timed out after 1 s'),
        ('kill', r'killed, by the kernel if memory ran out .*num_workers .*pid \d+\) is killed by'),
        (
            'exit',
            r'a data worker ended: .*num_workers=0 shows more .*with exit code 7',
        ),
    ],
)
def test_worker_that_fails_ends_the_run_at_once(images, tmp_path, kind, message):
    cfg = data_config(images, tmp_path / kind, dict(type='Fault', kind=kind), num_workers=1)
    cfg.train_dataloader.timeout = 1
    for path in (images / 'bee').iterdir():
        path.rename(path.with_name(f'{int(path.stem) + 3}.png'))
    runner = CAERunner.from_cfg(cfg)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        runner.train()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize('error', [EOFError, ConnectionResetError])
def test_tensor_of_a_worker_that_is_just_killed(error):
    batches = iter(DataLoader(range(100), num_workers=1))
    [worker] = batches._workers
    killer = Timer(0.2, os.kill, (worker.pid, signal.SIGKILL))
    with pytest.raises(RuntimeError, match='killed, by the kernel'), explained_worker_faults():
        killer.start()
        raise error
    with pytest.raises(error), explained_worker_faults():  # no worker has died
        raise error


@pytest.mark.parametrize(
    ('error', 'message'),
    [
        (OSError(24, 'Too many open files'), 'ran out of open files: `ulimit -n 65536`'),
        (RuntimeError('received 0 items of ancdata'), 'ran out of open files: `ulimit -n 65536`'),
        (RuntimeError('Pin memory thread exited unexpectedly'), 'pin_memory=False goes without'),
    ],
)
def test_what_ends_the_loading_beside_workers(error, message):
    with pytest.raises(RuntimeError, match=message), explained_worker_faults():
        raise error
