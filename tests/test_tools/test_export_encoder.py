"""tools/export_encoder.py as a user runs it."""

import re
import sys
import warnings
from pathlib import Path

import onnxruntime
import pytest
import torch
from builders import build_cae, cae_config, run_tool
from mmengine.config import Config

from cae_mm.conversion import deploy
from cae_mm.evaluation.encoder import load_backbone

FILES = pytest.mark.parametrize('name', ['encoder.onnx', 'encoder.pt2'])
IMAGENET = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
DENSE = dict(
    out_indices=(0, 1), out_type='featmap', use_rel_pos_bias=True, img_size=16, final_norm=False
)


@pytest.fixture
def export(tmp_path):
    """Runs the tool on an encoder with these options; returns the file and the encoder."""

    def export(name, *options, **backbone):
        cfg = Config(dict(model=cae_config(backbone=backbone)))
        cfg.dump(tmp_path / 'config.py')
        weights, out = tmp_path / 'epoch_1.pth', tmp_path / 'out' / name
        torch.save(build_cae().state_dict(), weights)
        run_tool('export_encoder.py', tmp_path / 'config.py', weights, '--out', out, *options)
        return out, load_backbone(cfg, weights).eval().requires_grad_(False)

    return export


def assert_same(path, images, expected):
    """Read the file by what knows nothing of the tool, and compare."""
    if path.suffix == '.pt2':
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of torch's own reader
            actual = torch.export.load(path).module()(images)
    else:
        session = onnxruntime.InferenceSession(path)
        actual = map(torch.from_numpy, session.run(None, {'images': images.numpy()}))
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-4, atol=1e-5)


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
        assert_same(path, images, model(images))
    printed = capsys.readouterr().out
    assert '(any batch, 3, 16, 16), RGB, normalised: minus (123.675, 116.28, 103.53)' in printed
    assert f'output  {out_type}\n' in printed and 'largest difference' in printed


@FILES
@pytest.mark.parametrize('normalize', [False, True])
def test_the_card_says_how_it_is_read(export, name, normalize, monkeypatch):
    path, model = export(name, '--out-type', 'cls_token', *(['--normalize'] if normalize else []))
    monkeypatch.chdir(path.parent)
    text = Path(f'{name}.md').read_text()
    assert '| network | 2 blocks of width 16, 2 heads, patches of 4 px |' in text
    assert '| images | 16 x 16 px, RGB in [0, 255], ' in text and '`epoch_1.pth`, SHA-256' in text
    code = re.search(r'```python\n(.*)```', text, re.DOTALL)[1]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of torch's own reader
        exec(code, values := {})
    images = values['images']
    if normalize:
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in IMAGENET)
        images = (images - mean) / std
    model.out_type = 'cls_token'
    torch.testing.assert_close(
        torch.as_tensor(values['outputs'][0]), model(images)[0], rtol=1e-4, atol=1e-5
    )


@FILES
@pytest.mark.parametrize('backbone', [DENSE, dict(window_size=3, out_type='featmap')])
def test_dense_encoders_at_another_size(export, name, backbone):
    """With positions and bias tables resized, and padding to whole patches."""
    path, model = export(name, '--img-size', '24', '13', **backbone)
    images = torch.randn(3, 3, 24, 13)
    assert_same(path, images, model(images))


def test_several_outputs_have_names(export):
    path, _ = export('encoder.onnx', **DENSE)
    session = onnxruntime.InferenceSession(path)
    assert [output.name for output in session.get_outputs()] == ['featmap_0', 'featmap_1']
    assert [output.shape[0] for output in session.get_outputs()] == ['batch', 'batch']
    [image_input] = session.get_inputs()
    assert image_input.name == 'images' and image_input.shape == ['batch', 3, 16, 16]


@FILES
def test_normalisation_in_the_file(export, name, capsys):
    path, model = export(name, '--normalize')
    pixels = torch.randint(256, (3, 3, 16, 16)).float()
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    assert_same(path, pixels, model((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)))
    assert '(any batch, 3, 16, 16), RGB, in [0, 255]' in capsys.readouterr().out


@FILES
@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda output: 1.001 * output, r'outputs differ by 1\.0e-03 of the'),
        (lambda output: output * (float('nan') if len(output) > 1 else 1), 'differ by nan'),
        (lambda output: output[:1], 'an output of shape'),
    ],
)
def test_a_file_that_differs_is_not_written(export, monkeypatch, tmp_path, name, spoil, message):
    suffix = Path(name).suffix
    write = deploy.WRITERS[suffix]

    def write_wrongly(*args):
        right = write(*args)
        assert args[-1].is_file()
        return lambda images: [spoil(output) for output in right(images)]

    monkeypatch.setitem(deploy.WRITERS, suffix, write_wrongly)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / name).write_text('of an earlier export')
    with pytest.raises(ValueError, match=f'was not written: .*{message}'):
        export(name)
    assert (tmp_path / 'out' / name).read_text() == 'of an earlier export'
    assert len([*(tmp_path / 'out').iterdir()]) == 1


def test_mistakes_are_said_before_any_work(export, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r'the name must end in \.onnx or \.pt2'):
        export('encoder.pb')
    with pytest.raises(ValueError, match='does not fit CAEViT'):
        export('encoder.pt2', '--prefix', 'encoder.')
    vit = dict(type='mmpretrain.VisionTransformer', arch='deit-t', img_size=32)
    with pytest.raises(ValueError, match='has a VisionTransformer, not a cae_mm.CAEViT'):
        deploy.ExportedEncoder(Config(dict(model=dict(backbone=vit))), 'random')
    with monkeypatch.context() as without:
        without.setitem(sys.modules, 'onnxruntime', None)
        with pytest.raises(ImportError, match=r"pip install .* 'cae-mm\[export\]'"):
            export('encoder.onnx')
    monkeypatch.setattr(deploy, 'ONNX_LIMIT', 1000)
    with pytest.raises(ValueError, match='GB do not fit into one ONNX file'):
        export('encoder.onnx')
    assert not (tmp_path / 'out').exists()
