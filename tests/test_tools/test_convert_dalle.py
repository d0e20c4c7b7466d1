import builtins
import hashlib
import os
import subprocess
import sys
import warnings
from collections import OrderedDict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from pickles import Call
from safetensors.torch import load_file
from torch import nn

from cae_mm.checkpoints import read_plain_pickle
from cae_mm.conversion.dalle import PUBLISHED, read_sizes
from cae_mm.models.targets import DALLEDecoder, DALLEEncoder

TOOL = Path(__file__).parents[2] / 'tools' / 'convert_dalle.py'
N_HID, VOCAB, N_INIT, BLOCKS = 8, 32, 4, 2


spec = spec_from_file_location('convert_dalle', TOOL)
tool = module_from_spec(spec)
spec.loader.exec_module(tool)


# Stand-ins for the package dall_e: its class names, attributes and layer names.


class Conv2d(nn.Module):
    def __init__(self, n_in, n_out, kw, use_float16=True):
        super().__init__()
        self.n_in, self.n_out, self.kw = n_in, n_out, kw
        self.use_float16, self.requires_grad = use_float16, False
        self.device = torch.device('cpu')
        self.w = nn.Parameter(2 * torch.randn(n_out, n_in, kw, kw) / (n_in**0.5 * kw))
        self.b = nn.Parameter(0.1 * torch.randn(n_out))

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=(self.kw - 1) // 2)


class EncoderBlock(nn.Module):
    kernels = (3, 3, 3, 1)

    def __init__(self, n_in, n_out, n_layers):
        super().__init__()
        self.n_in, self.n_out, self.n_layers = n_in, n_out, n_layers
        self.n_hid, self.device, self.requires_grad = n_out // 4, torch.device('cpu'), False
        self.post_gain = 1 / n_layers**2
        self.id_path = nn.Identity() if n_in == n_out else Conv2d(n_in, n_out, 1)
        widths = [n_in, *3 * [self.n_hid], n_out]
        self.res_path = nn.Sequential(OrderedDict())
        for i, kernel in enumerate(self.kernels):
            self.res_path.add_module(f'relu_{i + 1}', nn.ReLU())
            self.res_path.add_module(f'conv_{i + 1}', Conv2d(widths[i], widths[i + 1], kernel))

    def forward(self, x):
        return self.id_path(x) + self.post_gain * self.res_path(x)


class DecoderBlock(EncoderBlock):
    kernels = (1, 3, 3, 3)


class Network(nn.Module):
    group_count = 4

    def build(self, first, widths, last, block, resample):
        self.device, self.requires_grad = torch.device('cpu'), False
        self.use_mixed_precision = True
        self.blocks = nn.Sequential(OrderedDict(input=first))
        for g in range(4):
            group = nn.Sequential(OrderedDict())
            for b in range(BLOCKS):
                n_in = widths[g] if b == 0 else widths[g + 1]
                group.add_module(f'block_{b + 1}', block(n_in, widths[g + 1], 4 * BLOCKS))
            if g < 3:
                group.add_module(*resample())
            self.blocks.add_module(f'group_{g + 1}', group)
        output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=last))
        self.blocks.add_module('output', output)

    def forward(self, x):
        return self.blocks(x)


class Encoder(Network):
    def __init__(self):
        super().__init__()
        self.n_hid, self.n_blk_per_group, self.input_channels = N_HID, BLOCKS, 3
        self.vocab_size = VOCAB
        self.build(
            Conv2d(3, N_HID, 7),
            [N_HID, N_HID, 2 * N_HID, 4 * N_HID, 8 * N_HID],
            Conv2d(8 * N_HID, VOCAB, 1, use_float16=False),
            EncoderBlock,
            lambda: ('pool', nn.MaxPool2d(kernel_size=2)),
        )


class Decoder(Network):
    def __init__(self):
        super().__init__()
        self.n_init, self.n_hid, self.n_blk_per_group = N_INIT, N_HID, BLOCKS
        self.output_channels, self.vocab_size = 3, VOCAB
        self.build(
            Conv2d(VOCAB, N_INIT, 1, use_float16=False),
            [N_INIT, 8 * N_HID, 4 * N_HID, 2 * N_HID, N_HID],
            Conv2d(N_HID, 6, 1),
            DecoderBlock,
            lambda: ('upsample', nn.Upsample(scale_factor=2, mode='nearest')),
        )


PACKAGE = {
    'dall_e.utils': [Conv2d],
    'dall_e.encoder': [Encoder, EncoderBlock],
    'dall_e.decoder': [Decoder, DecoderBlock],
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=['zip', 'old'])
def save(request, tmp_path):
    """Saves as if from the package dall_e, in both formats of torch; the package is gone then."""

    def save(content, name='encoder.pkl'):
        path = tmp_path / name
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the old format looks for the classes' source
            patch.setitem(sys.modules, 'dall_e', ModuleType('dall_e'))
            for module_name, classes in PACKAGE.items():
                module = ModuleType(module_name)
                patch.setitem(sys.modules, module_name, module)
                for cls in classes:
                    patch.setattr(cls, '__module__', module_name)
                    setattr(module, cls.__name__, cls)
            torch.save(content, path, _use_new_zipfile_serialization=request.param == 'zip')
        assert 'dall_e' not in sys.modules
        return path

    return save


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the tool on a bad file; returns its message."""

    def run(path):
        assert tool.main([str(path), '--out-dir', str(tmp_path / 'out')]) == 1
        assert not list(tmp_path.rglob('out/*'))
        printed = capsys.readouterr()
        assert printed.out == ''
        assert printed.err.startswith('error: ') and printed.err.count('\n') == 1
        return printed.err

    return run


def convert(path, out_dir):
    """Runs the tool in a process of its own."""
    command = [sys.executable, str(TOOL), str(path), '--out-dir', str(out_dir)]
    environment = os.environ | {'PYTHONPATH': str(TOOL.parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_same(file, state):
    written = load_file(file)
    assert written.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(written[key], value, rtol=0, atol=0)


def test_encoder(save, tmp_path):
    encoder = Encoder()
    report = convert(save(encoder), tmp_path / 'out')

    file = tmp_path / 'out/dalle_encoder.safetensors'
    state = encoder.state_dict()
    assert_same(file, state)
    assert f'DALL-E encoder, {len(state)} tensors' in report
    assert f'n_hid {N_HID}, vocab_size {VOCAB}, blocks_per_group {BLOCKS}' in report
    assert 'not the published network, which has n_hid 256, vocab_size 8192, n_init 128' in report
    assert f'{file}: {file.stat().st_size} bytes' in report
    assert f'sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}' in report
    assert [path.name for path in file.parent.iterdir()] == [file.name]

    init_cfg = dict(type='Pretrained', checkpoint=str(file))
    ours = DALLEEncoder(n_hid=N_HID, vocab_size=VOCAB, blocks_per_group=BLOCKS, init_cfg=init_cfg)
    ours.init_weights()
    images = 0.8 * torch.rand(2, 3, 32, 32, dtype=torch.float64) + 0.1
    with torch.no_grad():
        expected = encoder.double()(images)  # [B, K, h, w]
        ours.double()
        actual = ours.classify(ours.encode_features(images).movedim(1, -1)).movedim(-1, 1)
    assert expected.argmax(1).unique().numel() > 1
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(ours.tokenize(images), expected.argmax(1))


def test_decoder(save, tmp_path, capsys):
    decoder = Decoder()
    path = save(decoder, 'decoder.pkl')
    assert tool.main([str(path), '--out-dir', str(tmp_path / 'out')]) == 0
    assert f'n_init {N_INIT}, n_hid {N_HID}, vocab_size {VOCAB}' in capsys.readouterr().out
    file = tmp_path / 'out/dalle_decoder.safetensors'
    assert_same(file, decoder.state_dict())

    init_cfg = dict(type='Pretrained', checkpoint=str(file))
    ours = DALLEDecoder(n_init=N_INIT, n_hid=N_HID, vocab_size=VOCAB, init_cfg=init_cfg)
    ours.init_weights()
    tokens = torch.randint(VOCAB, (2, 3, 3))
    with torch.no_grad():
        logits = decoder.double()(F.one_hot(tokens, VOCAB).movedim(-1, 1).double())
    expected = logits[:, :3].sigmoid().clamp(0.1, 0.9)
    torch.testing.assert_close(ours.double().decode_tokens(tokens), expected)


def test_two_files_at_once(save, tmp_path):
    sources = [str(save(Encoder())), str(save(Decoder(), 'decoder.pkl'))]
    assert tool.main([*sources, '--out-dir', str(tmp_path / 'out')]) == 0
    names = {path.name for path in (tmp_path / 'out').iterdir()}
    assert names == {'dalle_encoder.safetensors', 'dalle_decoder.safetensors'}


@pytest.mark.parametrize('nested', [None, 'state_dict', 'model'])
@pytest.mark.parametrize('prefix', ['', 'target_generator.'])
def test_state_dict(save, tmp_path, nested, prefix):
    state = Encoder().state_dict()
    content = OrderedDict((prefix + key, value) for key, value in state.items())
    if prefix:
        content['backbone.cls_token'] = torch.zeros(1)
    path = save({nested: content} if nested else content, 'dalle_encoder.pth')
    assert tool.main([str(path), '--out-dir', str(tmp_path / 'out')]) == 0
    assert_same(tmp_path / 'out/dalle_encoder.safetensors', state)


def test_published_sizes_are_recognised():
    assert PUBLISHED == dict(n_hid=256, vocab_size=8192, n_init=128, blocks_per_group=2)
    with torch.device('meta'):
        networks = {'encoder': DALLEEncoder(), 'decoder': DALLEDecoder()}
    for part, network in networks.items():
        found, sizes = read_sizes(network.state_dict())
        assert found == part
        assert sizes.items() <= PUBLISHED.items()


def nest(call):
    """An encoder with a call deep in its state."""
    encoder = Encoder()
    encoder.blocks.group_1.block_1.post_gain = call
    return encoder


@pytest.mark.parametrize(
    ('function', 'args', 'name'),
    [
        (os.system, ('touch marker',), f'{os.system.__module__}.system'),
        (builtins.eval, ('1',), 'eval'),
        (builtins.getattr, (1, 'real'), 'getattr'),
        (torch.load, ('nothing.pth',), 'torch.serialization.load'),
        (torch.hub.load, ('nothing', 'at_all'), 'torch.hub.load'),
        (nn.Linear, (1, 1), 'torch.nn.modules.linear.Linear'),
        (Path, ('nothing',), 'pathlib.'),
    ],
)
def test_everything_else_is_refused_by_name(
    save, refused, tmp_path, monkeypatch, function, args, name
):
    monkeypatch.chdir(tmp_path)
    for content in (Call(function, *args), nest(Call(function, *args))):
        message = refused(save(content))
        assert 'it refers to ' in message and name in message
        assert 'nothing in it was executed' in message
    assert not Path('marker').exists()


def test_nothing_stays_allowed(save, tmp_path):
    path, before = save(Encoder()), torch.serialization.get_safe_globals()
    assert tool.main([str(path), '--out-dir', str(tmp_path / 'out')]) == 0
    assert torch.serialization.get_safe_globals() == before
    with pytest.raises(ValueError, match='it refers to dall_e.encoder.Encoder'):
        read_plain_pickle(path)


def test_bad_names_and_shapes(save, refused):
    state = Encoder().state_dict()
    key = 'blocks.group_2.block_1.id_path.w'
    renamed = {
        k.replace('group_2.block_1.id_path', 'group_2.block_1.skip'): v for k, v in state.items()
    }
    message = refused(save(renamed))
    assert f'2 keys missing: {key}' in message and '2 keys unexpected: ' in message
    message = refused(save(state | {key: state[key][:-1]}))
    assert f'{key} is (15, 8, 1, 1) in the file and (16, 8, 1, 1) in the model' in message
    last = state.pop('blocks.output.conv.w')
    assert 'blocks.output.conv.w' in refused(save(state))
    state['blocks.output.conv.w'] = last.flatten()
    assert 'holds no DALL-E network' in refused(save(state))
    state |= {'blocks.output.conv.w': last, 'blocks.input.w': torch.zeros(1, 3, 7, 7)}
    assert 'holds no DALL-E network' in refused(save(state))


@pytest.mark.parametrize(
    'content', [[1, 2], {'a': torch.zeros(1)}, {'state_dict': 3}, Conv2d(1, 1, 1)]
)
def test_other_contents(save, refused, content):
    assert 'holds no DALL-E encoder or decoder' in refused(save(content))


def test_module_inside_itself(save, refused):
    encoder = Encoder()
    encoder.blocks.group_1._modules['again'] = encoder.blocks
    assert 'holds no DALL-E encoder or decoder' in refused(save(encoder))


@pytest.mark.parametrize('kept', [0.999, 0.5, 0.01])
def test_truncated_file(save, refused, kept):
    path = save(Encoder())
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    message = refused(path)
    assert 'download it again' in message or 'nothing in it was executed' in message


def test_no_torch_file(refused, tmp_path):
    path = tmp_path / 'encoder.pkl'
    path.write_text('<html>not found</html>')
    assert 'is no file that torch.save wrote' in refused(path)
    assert 'encoder.pkl.part' in refused(tmp_path / 'encoder.pkl.part')


def test_failed_write_leaves_old_file(save, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'out'
    path = save(Encoder())
    assert tool.main([str(path), '--out-dir', str(out)]) == 0
    before = (out / 'dalle_encoder.safetensors').read_bytes()

    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr(Path, 'replace', fail)
    assert tool.main([str(save(Encoder())), '--out-dir', str(out)]) == 1
    assert 'disk full' in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ['dalle_encoder.safetensors']
    assert (out / 'dalle_encoder.safetensors').read_bytes() == before
