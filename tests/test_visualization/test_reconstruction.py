import numpy as np
import pytest
import torch
from builders import GRID, PATCH, VOCAB, build_cae, cae_config, run_tool
from mmengine.config import Config
from PIL import Image

from cae_mm.visualization.pretraining import build_cae as build_from_config
from cae_mm.visualization.pretraining import load_views
from cae_mm.visualization.reconstruction import find_painter, paint_files, paint_reconstruction


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
    assert list(pictures) == ['image', 'masked', 'true tokens', 'predicted', 'no regressor']
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
    monkeypatch.setattr(model, 'reconstruct', lambda images, masks, regress=True: right)
    pictures = paint_reconstruction(model, views, masks, model.target_generator)
    for title in ('predicted', 'no regressor'):
        assert torch.equal(pictures['true tokens'], pictures[title])


@pytest.mark.parametrize('norm_patch', [False, True])
def test_pixel_pictures(views, masks, monkeypatch, norm_patch):
    """Pixels that are predicted exactly give the image back, also if normalised per patch."""
    target = dict(type='cae_mm.RGBTarget', norm_patch=norm_patch)
    model = build_cae(neck=dict(out_dims=48), target_generator=target).eval()
    inputs = model.data_preprocessor({'inputs': views[:1]})['inputs']
    ids = torch.stack([mask.nonzero().flatten() for mask in masks])
    exact = model.target_generator.targets(inputs[0], ids, GRID)
    monkeypatch.setattr(model, 'reconstruct', lambda images, masks, regress=True: exact)
    pictures = paint_reconstruction(model, views[:1], masks)
    torch.testing.assert_close(pictures['predicted'], pictures['image'])
    assert not torch.equal(pictures['masked'], pictures['image'])


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
    assert pictures['predicted'].shape == views[0].shape


def test_no_regressor_decodes_the_encoders_latents_of_the_masked_patches(views, masks):
    """By hand; and nothing that is visible changes it."""
    target = dict(type='cae_mm.RGBTarget')
    model = build_cae(neck=dict(out_dims=48), target_generator=target).eval()
    [images] = model.data_preprocessor({'inputs': views[:1]})['inputs']
    ids = torch.stack([mask.nonzero().flatten() for mask in masks])
    with torch.no_grad():
        latents = model.neck.project(model.backbone.forward_features(images, ids)[:, 1:])
        by_hand = model.neck.decode(latents, ids, GRID)
    torch.testing.assert_close(model.reconstruct(images, masks, regress=False), by_hand)
    assert not torch.allclose(model.reconstruct(images, masks), by_hand)
    images[1, :, :PATCH] = 0  # its masked patches are in the second and third row
    torch.testing.assert_close(model.reconstruct(images, masks, regress=False), by_hand)


def test_targets_that_cannot_be_painted_are_named():
    target = dict(type='cae_mm.HOGTarget')
    model = build_cae(neck=dict(out_dims=108), target_generator=target)
    with pytest.raises(ValueError, match=r"HOGTarget makes .* \(sheets=\['attention'\] of Pict"):
        find_painter(model)


def test_only_a_pretraining_can_be_painted():
    cfg = Config(dict(model=dict(type='ImageClassifier')))
    with pytest.raises(ValueError, match='ImageClassifier, but .* config of a pretraining'):
        build_from_config(cfg)


@pytest.fixture
def work(tmp_path):
    """A config, a checkpoint, a tokenizer's weights and an image that is not square."""
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
        dict(type='cae_mm.TwoViewResizedCrop', size=16, second_size=32, flip_prob=0.5),
        dict(type='cae_mm.CAEMaskGenerator', patch_size=4, min_block=2),
        dict(type='mmpretrain.PackInputs'),
    ]
    cfg = Config(dict(model=config, train_dataloader=dict(dataset=dict(pipeline=pipeline))))
    cfg.dump(tmp_path / 'config.py')
    image = Image.new('RGB', (50, 30), 'blue')
    image.paste('red', (10, 0, 25, 30))  # the left half of the largest central crop
    image.save(tmp_path / 'image.png')
    return tmp_path


def test_views_are_central_and_never_mirrored(work):
    cfg = Config.fromfile(work / 'config.py')
    for seed in range(4):
        views, masks = load_views(cfg, [work / 'image.png'], seed)
        assert [tuple(view.shape) for view in views] == [(1, 3, 16, 16), (1, 3, 32, 32)]
        assert (views[0][0, 2, :, :7] == 255).all() and (views[0][0, 0, :, 9:] == 255).all()
        assert masks.sum() == 8


def test_wrapped_datasets_have_the_same_views(work):
    cfg = Config.fromfile(work / 'config.py')
    bare = load_views(cfg, [work / 'image.png'], 0)
    dataset, other = cfg.train_dataloader.dataset, dict(pipeline=[dict(type='of_another')])
    wrapped = dict(type='ConcatDataset', datasets=[dataset, other])
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=wrapped)
    views, masks = load_views(cfg, [work / 'image.png'], 0)
    assert all(map(torch.equal, [*views, masks], [*bare[0], bare[1]]))
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=other)
    with pytest.raises(ValueError, match='pipeline of the config has no cae_mm.LoadImage'):
        load_views(cfg, [work / 'image.png'], 0)


def test_mask_ratios_of_one_image(work):
    cfg, files = Config.fromfile(work / 'config.py'), [work / 'image.png'] * 2
    pictures = paint_files(cfg, work / 'cae.pth', files, mask_ratios=[0.25, 0.75], seed=3)
    masked = (pictures['masked'] == 0.5).all(1).flatten(1).float().mean(1)
    assert masked.tolist() == [0.25, 0.75, 0.25, 0.75]  # of the first image, of the second
    again = paint_files(cfg, work / 'cae.pth', files, mask_ratios=[0.25, 0.75], seed=3)
    other = paint_files(cfg, work / 'cae.pth', files, mask_ratios=[0.25, 0.75], seed=4)
    assert all(torch.equal(picture, again[title]) for title, picture in pictures.items())
    assert not torch.equal(pictures['masked'], other['masked'])


def test_random_weights_follow_the_seed(work):
    cfg, files = Config.fromfile(work / 'config.py'), [work / 'image.png']
    one, same, other = (
        paint_files(cfg, 'random', files, seed=seed)['predicted'] for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_tool(work):
    files = [work / name for name in ('config.py', 'cae.pth', 'image.png')]
    ratios = ['--mask-ratio', 0.25, 0.5]
    run_tool('picture.py', 'reconstruct', *files, *ratios, '--out', work / 'one.png')
    run_tool('picture.py', 'reconstruct', *files, *ratios, '--out', work / 'same.png')
    assert (work / 'one.png').read_bytes() == (work / 'same.png').read_bytes()
    with Image.open(work / 'one.png') as picture:
        assert picture.size == (24 + 5 * 164 + 4, 24 + 2 * 164 + 4)
        image = np.asarray(picture.convert('RGB').crop((24, 24, 184, 184)))
    assert (image[:, :70] == [255, 0, 0]).all() and (image[:, 90:] == [0, 0, 255]).all()
