import numpy as np
import pytest
import torch
from builders import GRID, PATCH, VOCAB, build_cae, cae_config, run_tool
from mmengine.config import Config
from PIL import Image

from cae_mm.visualization import paint_reconstruction, save_pictures


@pytest.fixture
def views():
    torch.manual_seed(0)
    sides = (GRID[0] * PATCH, GRID[0] * 8)
    return [torch.randint(256, (2, 3, side, side), dtype=torch.uint8) for side in sides]


@pytest.fixture
def masks():
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, :4] = masks[1, 5:9] = True
    return masks


def test_token_pictures(views, masks):
    model = build_cae().eval()
    pictures = paint_reconstruction(model, views, masks, model.target_generator)
    assert list(pictures) == ['image', 'masked', 'true tokens', 'predicted tokens']
    rgb = views[0].flip(1) / 255
    torch.testing.assert_close(pictures['image'], rgb, rtol=0, atol=1e-5)
    assert (pictures['masked'][0, :, :PATCH] == 0.5).all()  # the first row of patches
    torch.testing.assert_close(pictures['masked'][0, :, PATCH:], rgb[0, :, PATCH:])
    tokens = model.target_generator.tokenize(
        model.data_preprocessor({'inputs': views})['inputs'][1]
    )
    painted = model.target_generator.decode_tokens(tokens)
    want = ((painted * 318.75 - 31.875) / 255).clamp(0, 1)  # the preprocessor's, turned round
    torch.testing.assert_close(pictures['true tokens'], want)


def test_predicted_tokens_are_the_models(views, masks, monkeypatch):
    """If it guesses right everywhere, both pictures agree."""
    model = build_cae().eval()
    inputs = model.data_preprocessor({'inputs': views})['inputs']
    tokens = model.target_generator.tokenize(inputs[1]).flatten(1)
    right = torch.nn.functional.one_hot(tokens[masks].view(2, 4), 32).float()
    monkeypatch.setattr(model, 'reconstruct', lambda images, masks: right)
    pictures = paint_reconstruction(model, views, masks, model.target_generator)
    assert torch.equal(pictures['true tokens'], pictures['predicted tokens'])


@pytest.mark.parametrize('norm_patch', [False, True])
def test_pixel_pictures(views, masks, monkeypatch, norm_patch):
    """Pixels that are predicted exactly give the image back, also if normalised per patch."""
    target = dict(type='cae_mm.RGBTarget', norm_patch=norm_patch)
    model = build_cae(neck=dict(out_dims=48), target_generator=target).eval()
    inputs = model.data_preprocessor({'inputs': views[:1]})['inputs']
    ids = torch.stack([mask.nonzero().flatten() for mask in masks])
    exact = model.target_generator.targets(inputs[0], ids, GRID)
    monkeypatch.setattr(model, 'reconstruct', lambda images, masks: exact)
    pictures = paint_reconstruction(model, views[:1], masks)
    torch.testing.assert_close(pictures['predicted'], pictures['image'])
    assert not torch.equal(pictures['masked'], pictures['image'])


def test_targets_that_cannot_be_painted_are_named(views, masks):
    target = dict(type='cae_mm.HOGTarget')
    model = build_cae(neck=dict(out_dims=108), target_generator=target)
    with pytest.raises(ValueError, match='what a HOGTarget makes .* pictures need pixels or'):
        paint_reconstruction(model, views[:1], masks)


def test_picture_has_a_row_per_image_and_a_column_per_title(tmp_path):
    pictures = {name: torch.full((3, 3, 8, 8), value) for name, value in (('a', 0.0), ('b', 1.0))}
    save_pictures(pictures, tmp_path / 'new' / 'picture.png')
    with Image.open(tmp_path / 'new' / 'picture.png') as picture:
        image = np.asarray(picture.convert('L'))
    assert image.shape == (640, 400)
    assert image[320, 100] == 0 and image[320, 300] == 255


def test_tokens_of_the_first_view_are_painted(views, masks):
    """A tokenizer of a second round needs no second view; true tokens show their own patches."""
    kmeans = dict(
        type='cae_mm.KMeansTokenizer', backbone=cae_config()['backbone'], vocab_size=VOCAB
    )
    model = build_cae(target_generator=kmeans).eval()
    tokenizer = model.target_generator
    tokenizer.patches.normal_()
    pictures = paint_reconstruction(model, views[:1], masks, tokenizer)
    normalised = model.data_preprocessor({'inputs': views[0]})['inputs'][0]
    painted = tokenizer.decode_tokens(tokenizer.tokenize(normalised))
    mean, std = model.data_preprocessor.means[0], model.data_preprocessor.stds[0]
    expected = ((painted * std + mean) / 255).clamp(0, 1)
    torch.testing.assert_close(pictures['true tokens'], expected)
    assert pictures['predicted tokens'].shape == views[0].shape


def test_reconstruct_tool_paints_a_checkpoint(tmp_path):
    """From a config, a checkpoint, a tokenizer's weights and an image that is not square."""
    model = build_cae()
    torch.save(model.state_dict(), tmp_path / 'cae.pth')
    torch.save(model.target_generator.state_dict(), tmp_path / 'dvae.pth')
    config = cae_config()
    config['target_generator']['init_cfg'] = dict(
        type='Pretrained', checkpoint=str(tmp_path / 'dvae.pth')
    )
    pipeline = [
        dict(type='cae_mm.LoadImage'),
        dict(type='mmpretrain.RandomFlip', prob=0.5),
        dict(type='cae_mm.TwoViewResizedCrop', size=16, second_size=32),
        dict(type='cae_mm.CAEMaskGenerator', patch_size=4, min_block=2),
        dict(type='mmpretrain.PackInputs'),
    ]
    cfg = Config(dict(model=config, train_dataloader=dict(dataset=dict(pipeline=pipeline))))
    cfg.dump(tmp_path / 'config.py')
    image = Image.new('RGB', (50, 30), 'blue')
    image.paste('red', (10, 0, 40, 30))  # the largest central crop
    image.save(tmp_path / 'image.png')
    files = [tmp_path / name for name in ('config.py', 'cae.pth', 'image.png')]
    run_tool('reconstruct.py', *files, '--out', tmp_path / 'out.png')
    with Image.open(tmp_path / 'out.png') as picture:
        assert picture.size == (800, 240)
        shown = np.asarray(picture.convert('RGB').crop((10, 50, 190, 210)))  # the image
    assert (shown == [255, 0, 0]).all()
