"""mmengine reads plain data whichever scheme a path has, and what Runners wrote stays readable."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint as theirs
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from pickles import Call
from torch import nn
from two_processes import in_two_processes, load_from_web

from cae_mm.checkpoints import schemes


@pytest.fixture
def layer():
    return nn.Linear(2, 1)


def hostile(folder):
    """Writes a file that makes a folder when it is executed."""
    torch.save(dict(meta=Call(os.mkdir, str(folder / 'executed'))), folder / 'hostile.pth')
    return folder / 'hostile.pth'


def test_every_scheme_is_ours():
    for prefix, loader in CheckpointLoader._schemes.items():
        module = getattr(loader, '__module__', '')
        assert module.startswith('cae_mm.'), f'{prefix!r} is read by {module}'


def test_what_older_runners_wrote_is_read_as_before(tmp_path, layer):
    """Their numbers, histories and configs: what torch refuses to read as data."""
    path = tmp_path / 'epoch_1.pth'
    content = dict(
        meta=dict(
            epoch=1,
            iter=np.int64(3),
            CLASSES=('a', 'b'),
            PALETTE=np.array([[1, 2, 3]]),
            dataset_meta=ConfigDict(classes=['a'], nested=ConfigDict(x=1)),
            hook_msgs=dict(best_score=np.float64(0.5)),
        ),
        state_dict=layer.state_dict(),
        message_hub=dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])), runtime_info={}),
    )
    torch.save(content, path)
    other = nn.Linear(2, 1)
    read = load_checkpoint(other, str(path), map_location='cpu', strict=True)
    assert torch.equal(other.weight, layer.weight)
    assert read['meta']['dataset_meta'] == dict(classes=['a'], nested=dict(x=1))
    assert read['meta']['PALETTE'].tolist() == [[1, 2, 3]] and read['meta']['iter'] == 3
    assert read['message_hub']['log_scalars']['loss'].current() == 1
    assert read['state_dict']._metadata


def test_anything_that_is_plain_is_handed_on_as_it_is(tmp_path):
    """Some backbones load a tensor, or other names than 'state_dict'."""
    path = tmp_path / 'a.pth'
    for content in (torch.ones(3), {'model': {'a': torch.ones(1)}, 'epoch': 3}):
        torch.save(content, path)
        read = CheckpointLoader.load_checkpoint(str(path), 'cpu')
        assert torch.equal(read, content) if torch.is_tensor(content) else read == content


def test_tensors_go_where_they_are_wanted(tmp_path):
    torch.save({'a': [torch.ones(2)]}, tmp_path / 'a.pth')
    assert CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'), 'meta')['a'][0].is_meta
    assert CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'))['a'][0].device.type == 'cpu'


def test_files_are_found_as_before(tmp_path, monkeypatch, layer):
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save(layer.state_dict(), tmp_path / 'a.pth')
    load_checkpoint(nn.Linear(2, 1), '~/a.pth', strict=True)
    with pytest.raises(FileNotFoundError, match='none.pth can not be found'):
        load_checkpoint(layer, '~/none.pth')


URL = 'https://files.org/weights/layer.pth?version=1'


@pytest.mark.parametrize(
    ('name', 'table'),
    [
        (URL, None),
        ('torchvision://resnet', 'get_torchvision_models'),
        ('modelzoo://resnet', 'get_torchvision_models'),
        ('open-mmlab://resnet', 'get_external_models'),
        ('openmmlab://resnet', 'get_external_models'),
        ('mmcls://resnet', 'get_mmcls_models'),
    ],
)
def test_downloads_are_read_as_data(tmp_path, monkeypatch, name, table):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    downloads = []

    def download(url, path):
        downloads.append(url)
        Path(path).write_bytes(source.read_bytes())

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    if table:
        monkeypatch.setattr(theirs, table, lambda: {'resnet': URL})
    source = tmp_path / 'source.pth'
    torch.save(dict(state_dict={'backbone.a': torch.ones(1)}), source)
    for _ in range(2):  # once from there, once from the disk
        state = CheckpointLoader.load_checkpoint(name)['state_dict']
        assert list(state) == ['a' if 'mmcls' in name else 'backbone.a']
    assert downloads == [URL]
    (tmp_path / 'hub/checkpoints/layer.pth').unlink()
    source = hostile(tmp_path)
    with pytest.raises(ValueError, match='layer.pth was refused, .* refers to .*mkdir'):
        CheckpointLoader.load_checkpoint(name)
    assert not (tmp_path / 'executed').exists()


def test_processes_of_a_machine_download_once(tmp_path):
    """And none waits for a download that failed."""
    torch.save({'a': torch.ones(1)}, tmp_path / 'there.pth')
    urls = [f'https://files.org/{name}.pth' for name in ('there', 'missing')]
    (main, failed), (other, missed) = in_two_processes(load_from_web, tmp_path, urls)
    assert main['a'].item() == other['a'].item() == 1
    assert (tmp_path / 'downloads').read_text().split() == urls
    assert 'No such file' in failed and 'missing.pth can not be found' in missed


@pytest.mark.parametrize('url', ['https://files.org', 'https://files.org/a/..'])
def test_a_download_stays_in_its_folder(tmp_path, monkeypatch, url):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(ValueError, match=f'{url} names no file'):
        CheckpointLoader.load_checkpoint(url)


def test_files_of_mmengines_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    monkeypatch.setattr(theirs, 'get_external_models', lambda: {'own': 'hostile.pth'})
    hostile(tmp_path)
    with pytest.raises(ValueError, match='hostile.pth was refused'):
        CheckpointLoader.load_checkpoint('open-mmlab://own')


@pytest.mark.parametrize('name', ['pavi://a', 's3://a', 'x:petrel://a'])
def test_other_storage_is_refused(name):
    with pytest.raises(ValueError, match=f'{name} is not loaded from there: download it'):
        CheckpointLoader.load_checkpoint(name)


def test_texts_of_configs_are_left_out_and_nothing_else(tmp_path):
    path = tmp_path / 'a.pth'
    meta, info = dict(epoch=1, cfg='exit()', config='exit()'), dict(cfg='exit()', max_epochs=2)
    torch.save(dict(meta=meta, message_hub=dict(runtime_info=info), cfg='kept'), path)
    read = schemes.load_from_plain(str(path))
    assert read == dict(
        meta=dict(epoch=1), message_hub=dict(runtime_info=dict(max_epochs=2)), cfg='kept'
    )


@pytest.mark.filterwarnings('ignore:You are using `torch.load` with:FutureWarning')  # torch 2.4
def test_the_documented_way_back(tmp_path):
    """docs/checkpoints.md: for one's own files, mmengine's loader can be put back."""
    path = hostile(tmp_path)
    try:
        CheckpointLoader.register_scheme('', theirs.load_from_local, force=True)
        CheckpointLoader.load_checkpoint(str(path))
    finally:
        CheckpointLoader.register_scheme('', schemes.load_from_plain, force=True)
    assert (tmp_path / 'executed').exists()
