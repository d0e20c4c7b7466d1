"""Pickles are read as plain data, whatever their format and protocol, or refused."""

import argparse
import os
import pickle
import tarfile
import zipfile
from collections import Counter, OrderedDict
from io import BytesIO

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from pickles import Call

from cae_mm.checkpoints import EncoderDescription, read_checkpoint
from cae_mm.checkpoints.unpickler import REFUSED, PlainUnpickler, Shell, read_plain_pickle

PROTOCOLS = range(6)


def read(data):
    return PlainUnpickler(BytesIO(data), {'test.Shell': Shell}).load()


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_containers_and_arrays(protocol):
    content = {
        'text': 'ä',
        'numbers': [1, -(2**40), 2.5, True, None],
        'bytes': (b'\xff', b'x' * 300, b''),
        'containers': [OrderedDict(a=1), Counter('aab'), {1, 2}, frozenset('ab'), bytearray(b'x')],
        'arrays': [np.arange(6.0).reshape(2, 3).T, np.arange(3, dtype='>i2'), np.zeros((0, 2))],
        'scalars': [np.float32(2.5), np.bool_(True)],
        'others': [np.array(['text']), np.array([True, False])],
    }
    actual = read(pickle.dumps(content, protocol=protocol))
    arrays = [c.pop('arrays') + c.pop('others') for c in (actual, content)]
    for a, b in zip(*arrays, strict=True):
        assert np.array_equal(a, b)
    assert actual == content


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('protocol', PROTOCOLS[1:])  # torch's storages need a binary one
def test_tensors(tmp_path, protocol, zipped):
    base = torch.arange(12.0)
    types = (torch.half, torch.bool, torch.long, torch.int8, torch.uint8, torch.complex64)
    content = {str(dtype): torch.tensor([1, 0], dtype=dtype) for dtype in types}
    content |= {
        'brain': torch.tensor([1.5], dtype=torch.bfloat16),
        'view': base.view(3, 4).T[1:],
        'same': base[3:5],
        'scalar': torch.tensor(2.0),
        'empty': torch.zeros(0, 3),
        'parameter': torch.nn.Parameter(torch.ones(2)),
        'size': torch.Size([1, 2]),
        'device': torch.device('cpu'),
        'dtype': torch.float32,
    }
    path = tmp_path / 'a.pth'
    options = dict(_use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    torch.save(content, path, **options)
    actual = read_plain_pickle(path)
    assert actual.keys() == content.keys()
    for key, value in content.items():
        assert torch.equal(actual[key], value) if torch.is_tensor(value) else actual[key] == value
    assert (
        actual['view'].untyped_storage().data_ptr() == actual['same'].untyped_storage().data_ptr()
    )


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_calls_are_refused_in_all_protocols(tmp_path, protocol):
    data = pickle.dumps({'a': [Call(os.mkdir, str(tmp_path / 'executed'))]}, protocol=protocol)
    with pytest.raises(ValueError, match='it refers to .*mkdir, which is not allowed there'):
        read(data)
    assert not (tmp_path / 'executed').exists()


HISTORY = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'


@pytest.mark.parametrize(
    'function',
    [
        HISTORY,
        b'cargparse\nNamespace\n',
        b'ctest\nShell\n',
        b'ctorch._utils\n_rebuild_tensor_v2\n',
        b'ccollections\nCounter\n',
        b'(l',
    ],
)
@pytest.mark.parametrize('state', [b"}S'update'\nK\x01s", b"(N}S'update'\nK\x01st"])
def test_only_new_objects_take_a_state(function, state):
    """Else a file could change a class, and with it this process."""
    before = [dict(vars(kind)) for kind in (HistoryBuffer, argparse.Namespace, Shell)]
    with pytest.raises(ValueError, match='it sets the state of .* not allowed there'):
        read(function + state + b'b.')
    assert [dict(vars(kind)) for kind in (HistoryBuffer, argparse.Namespace, Shell)] == before


def test_text_of_python_2_may_have_any_letter():
    assert read(b'\x80\x02U\x02\xc3\xa9.') == 'é'  # a str of two bytes


F8 = b"cnumpy\ndtype\n(S'%s'\nI00\nI00\ntR(K\x03S'>'\n%sI-1\nI-1\nI%d\ntb."


def test_the_state_of_a_number_type_stays_with_the_file():
    assert read(F8 % (b'f8', b'NNN', 63)).dtype == np.dtype('>f8')
    assert np.dtype('f8') == np.dtype('<f8') and not np.dtype('f8').hasobject


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (F8 % (b'O', b'NNN', 63), 'it has arrays of object'),
        (F8 % (b'f8,O', b'NNN', 63), "it has arrays of .*'O'"),
        (b"cargparse\nNamespace\n)\x81}S'__array_interface__'\n}sb.", 'it sets __array_inter'),
        (HISTORY + b']]\x86R.', 'it calls .*HistoryBuffer'),
        (
            HISTORY + b")\x81}(S'_log_history'\n]S'_count_history'\n]S'max_length'\nK\x05ub.",
            'a history of something else than numbers',
        ),
    ],
)
def test_nothing_makes_numpy_look_at_other_memory(data, message):
    with pytest.raises(ValueError, match=message):
        read(data)


@pytest.mark.parametrize(
    'data',
    [
        b'K\x01)R.',  # a number
        b"S'a'\n)R.",  # text
        b'}cbuiltins\nset\n)R)R.',  # what a call returned
        b'K\x01)\x81.',
    ],
)
def test_only_the_table_is_called(data):
    with pytest.raises(ValueError, match='it calls .* not allowed there'):
        read(data)


@pytest.mark.parametrize('name', REFUSED.split())
def test_other_instructions_are_refused(name):
    with pytest.raises(ValueError, match='instructions that plain data do not need'):
        read(b'(' + getattr(pickle, name) + b'os\nsystem\n.')


def test_getattr_has_no_use(tmp_path):
    for args in [(HistoryBuffer, 'update'), (HistoryBuffer, '__init__'), (OrderedDict, 'min')]:
        torch.save(dict(state_dict={}, other=Call(getattr, *args)), tmp_path / 'a.pth')
        with pytest.raises(ValueError, match='a.pth was refused, .* executed: .*getattr of'):
            read_plain_pickle(tmp_path / 'a.pth')


def test_tensors_with_attributes_are_read_as_tensors(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.note = 'x'
    tensor = torch.arange(2)
    tensor.note = 'x'
    torch.save({'a': weight, 'b': tensor}, tmp_path / 'a.pth')
    content = read_plain_pickle(tmp_path / 'a.pth')
    assert content['a'].tolist() == [1, 1] and content['b'].tolist() == [0, 1]
    assert not hasattr(content['b'], 'note')


def test_other_archives_are_refused(tmp_path):
    path = tmp_path / 'a.pth'
    with zipfile.ZipFile(
        path, 'w'
    ) as archive:  # torch.load takes this for TorchScript, and runs it
        archive.writestr('a/constants.pkl', pickle.dumps(()))
        archive.writestr('a/data.pkl', b'c__torch__\nModule\n)\x81.')
    with pytest.raises(ValueError, match='it refers to __torch__'):
        read_plain_pickle(path)
    (tmp_path / 'pickle').write_bytes(pickle.dumps(1))
    with tarfile.open(path, 'w') as archive:  # torch's oldest format
        archive.add(tmp_path / 'pickle', 'pickle')
    with pytest.raises(ValueError, match='it is no file that torch.save wrote'):
        read_plain_pickle(path)


@pytest.mark.parametrize('zipped', [True, False])
def test_incomplete_files_say_so(tmp_path, zipped):
    path = tmp_path / 'a.pth'
    torch.save({'a': torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for length in (len(data) // 2, len(data) - 2):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match='a.pth was refused, .*it is damaged or not complete'):
            read_plain_pickle(path)


@pytest.mark.parametrize('foreign', [{}, {'mean': 'mean', 'min': None}])
def test_history_is_read_and_the_running_log_stays_whole(tmp_path, monkeypatch, foreign):
    """A history that is unpickled gives its statistics to all histories, so mmengine does it."""
    path = tmp_path / 'epoch_1.pth'
    history, running = HistoryBuffer([1.0, 4.0], [1, 1]), HistoryBuffer([2.0, 4.0], [1, 1])
    with monkeypatch.context() as patch:
        for name, method in foreign.items():
            patch.setitem(HistoryBuffer._statistics_methods, name, method)
        torch.save(dict(state_dict={}, message_hub=dict(log_scalars=dict(loss=history))), path)
    content = read_plain_pickle(path)
    values = {name: running.statistics(name) for name in ('min', 'max', 'mean', 'current')}
    assert values == {'min': 2, 'max': 4, 'mean': 3, 'current': 4}
    assert content['message_hub']['log_scalars']['loss'].statistics('mean') == 2.5


@pytest.mark.parametrize('content', [b'', b'hello', b'<html>not found</html>'])
def test_what_is_no_checkpoint_at_all_is_called_so(tmp_path, content):
    path = tmp_path / 'a.pth'
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match='a.pth was refused.*: it is no file that torch.save wrote'
    ):
        read_plain_pickle(path)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(pretrain_img_size=[2**20, 2**20]), '1048576x1048576 pixels are more than 65536'),
        (dict(embed_dims=2**40), 'not whole numbers from 1 to 8192'),
        (dict(img_size=[32]), 'not enough values'),
        (dict(patch_size=0), 'more than 65536 patches'),
        (dict(num_heads=2.5), 'not whole numbers'),
    ],
)
def test_descriptions_have_sizes_that_a_model_can_have(tmp_path, changes, message):
    """Tables of positions are made for them, which would take all of the memory."""
    sizes = EncoderDescription(8, 1, 2, 4.0, 4, 3, (8, 8), (8, 8), False, True, False).to_dict()
    meta = dict(cae_mm=dict(encoder=sizes | changes))
    torch.save(dict(state_dict={}, meta=meta), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=f'a.pth describes its encoder wrongly: .*{message}'):
        _ = read_checkpoint(tmp_path / 'a.pth').description


@pytest.mark.parametrize('method', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_records_are_refused(tmp_path, method):
    """Torch writes none, and a few kB of them could become any size."""
    torch.save({'a': torch.zeros(1000)}, tmp_path / 'a.pth')
    with (
        zipfile.ZipFile(tmp_path / 'a.pth') as plain,
        zipfile.ZipFile(tmp_path / 'b.pth', 'w', method) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match='b.pth was refused, .*larger than what the file holds'):
        read_plain_pickle(tmp_path / 'b.pth')


def test_keys_whose_hash_may_take_for_ever_are_refused():
    with pytest.raises(ValueError, match='it has tuples of tuples as keys'):
        read(pickle.dumps({((1,),): 2}))
    assert read(pickle.dumps({(1, 'a'): 2})) == {(1, 'a'): 2}
