"""tools/export_encoder.py as a user runs it, in this process to save the imports."""

import sys
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import onnxruntime
import pytest
import torch
from builders import build_cae, cae_config
from mmengine.config import Config

from cae_mm.evaluation import load_backbone

TOOL = Path(__file__).parents[2] / 'tools' / 'export_encoder.py'
spec = spec_from_file_location('export_encoder', TOOL)
tool = module_from_spec(spec)
spec.loader.exec_module(tool)

DENSE = dict(
    out_indices=(0, 1), out_type='featmap', use_rel_pos_bias=True, img_size=16, final_norm=False
)


@pytest.fixture
def export(tmp_path, monkeypatch):
    """Runs the tool on an encoder with these options; returns the file and the encoder."""

    def export(name, *options, **backbone):
        cfg = Config(dict(model=cae_config(backbone=backbone)))
        cfg.dump(tmp_path / 'config.py')
        pretraining = {key: backbone[key] for key in ('img_size',) if key in backbone}
        weights = build_cae(backbone=pretraining).state_dict()
        torch.save(dict(state_dict=weights), tmp_path / 'epoch_1.pth')
        out = tmp_path / 'out' / name
        command = [str(TOOL), str(tmp_path / 'config.py'), str(tmp_path / 'epoch_1.pth')]
        monkeypatch.setattr(sys, 'argv', [*command, '--out', str(out), *options])
        tool.main()
        model = load_backbone(cfg, tmp_path / 'epoch_1.pth', prefix='backbone.').eval()
        return out, model

    return export


def run(path, images):
    """What the file gives, by a reader that knows nothing of the tool."""
    if path.suffix == '.pt2':
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of torch's own reader
            return list(torch.export.load(path).module()(images))
    session = onnxruntime.InferenceSession(path)
    return [torch.from_numpy(x) for x in session.run(None, {'images': images.numpy()})]


def assert_same(path, images, expected):
    actual = run(path, images)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('name', 'out_type'),
    [
        ('encoder.onnx', 'raw'),
        ('encoder.onnx', 'cls_token'),
        ('encoder.onnx', 'avg_featmap'),
        ('encoder.pt2', 'cls_token'),
        ('encoder.pt2', 'featmap'),
    ],
)
def test_any_batch_and_every_type_of_output(export, name, out_type, capsys):
    path, model = export(name, '--out-type', out_type)
    model.out_type = out_type
    for batch_size in (1, 2, 5):
        images = torch.randn(batch_size, 3, 16, 16)
        with torch.no_grad():
            assert_same(path, images, model(images))
    printed = capsys.readouterr().out
    assert '(any batch, 3, 16, 16), RGB, normalised: minus (123.675, 116.28, 103.53)' in printed
    assert f'output  {out_type}\n' in printed and 'largest difference' in printed


@pytest.mark.parametrize('name', ['encoder.onnx', 'encoder.pt2'])
@pytest.mark.parametrize('backbone', [DENSE, dict(window_size=3, out_type='featmap')])
def test_dense_encoders_at_another_size(export, name, backbone):
    """With positions and bias tables resized, and padding to whole patches."""
    size = (24, 13)
    path, model = export(name, '--img-size', *map(str, size), **backbone)
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        assert_same(path, images, model(images))


def test_several_outputs_have_names(export):
    path, _ = export('encoder.onnx', **DENSE)
    session = onnxruntime.InferenceSession(path)
    assert [output.name for output in session.get_outputs()] == ['featmap_0', 'featmap_1']
    assert [output.shape[0] for output in session.get_outputs()] == ['batch', 'batch']
    [image_input] = session.get_inputs()
    assert image_input.name == 'images' and image_input.shape == ['batch', 3, 16, 16]


@pytest.mark.parametrize('name', ['encoder.onnx', 'encoder.pt2'])
def test_normalisation_in_the_file(export, name, capsys):
    path, model = export(name, '--normalize')
    pixels = torch.randint(256, (3, 3, 16, 16)).float()
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    with torch.no_grad():
        expected = model((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert_same(path, pixels, expected)
    assert '(any batch, 3, 16, 16), RGB, in [0, 255]' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['encoder.onnx', 'encoder.pt2'])
def test_a_file_that_differs_is_not_kept(export, name, monkeypatch):
    kind = 'export_onnx' if name.endswith('onnx') else 'export_program'
    write = getattr(tool, kind)

    def write_wrongly(*args):
        right = write(*args)
        return lambda images: [1.001 * output for output in right(images)]

    monkeypatch.setattr(tool, kind, write_wrongly)
    with pytest.raises(
        ValueError, match=r'was not kept: outputs differ by 1\.0e-03 of the'
    ) as info:
        export(name)
    assert not Path(str(info.value).split(' was')[0]).exists()


@pytest.mark.parametrize(
    ('broken', 'message'),
    [
        (lambda outputs: [output[:1] for output in outputs], 'an output of shape'),
        (lambda outputs: [output * float('nan') for output in outputs], 'differ by nan'),
    ],
)
def test_wrong_shapes_and_nan_are_refused(export, monkeypatch, broken, message):
    monkeypatch.setattr(tool, 'export_program', lambda model, *_: lambda x: broken(model(x)))
    with pytest.raises(ValueError, match=message):
        export('encoder.pt2')


def test_mistakes_are_said_before_any_work(export, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r'the name must end in \.onnx or \.pt2'):
        export('encoder.pb')
    with pytest.raises(ValueError, match='does not fit CAEViT'):
        export('encoder.pt2', '--prefix', 'encoder.')
    vit = dict(type='mmpretrain.VisionTransformer', arch='deit-t', img_size=32)
    with pytest.raises(ValueError, match='has a VisionTransformer, not a cae_mm.CAEViT'):
        args = type('Args', (), dict(checkpoint='random', config='x', prefix='', out_type=None))
        tool.build(Config(dict(model=dict(backbone=vit))), args)
    monkeypatch.setattr(tool, 'ONNX_LIMIT', 1000)
    with pytest.raises(ValueError, match='GB do not fit into one ONNX file'):
        export('encoder.onnx')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match=r"pip install .* 'cae-mm\[export\]'"):
        export('encoder.onnx')
    assert not (tmp_path / 'out').exists()
