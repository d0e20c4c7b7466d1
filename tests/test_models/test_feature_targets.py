"""Features of given models against calls of these models by hand; the losses of CAE v2."""

import json
import sys
from dataclasses import replace
from inspect import signature

import pytest
import timm
import torch
import torch.nn.functional as F
from builders import GRID, WIDTH, build_cae, cae_config, make_batch
from mmengine.registry import MODELS
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from cae_mm.models import CAEFeatures, CLIPFeatures, TimmFeatures, describe_model
from cae_mm.models.targets.features import IMAGENET
from cae_mm.patches import draw_ids, split_mask

IDS = torch.tensor([[0, 4, 1], [5, 1, 2]])
WIDE = (2, 3)
TIMM = dict(name='test_vit', patch_size=16, options=dict(dynamic_img_size=True))
# https://github.com/openai/CLIP/blob/main/clip/clip.py
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture
def clip(tmp_path):
    """A folder of transformers' with random weights of both towers."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    vision = dict(**sizes, image_size=16, patch_size=8, projection_dim=12)
    text = dict(**sizes, vocab_size=8, projection_dim=12)
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    return tmp_path, model


def cae_teacher(path, **said):
    """A pretraining checkpoint with what is said of its images, and the target that reads it."""
    model = build_cae()
    encoder = replace(describe_model(model), **said).to_dict()
    torch.save({'state_dict': model.state_dict(), 'meta': {'cae_mm': {'encoder': encoder}}}, path)
    backbone = cae_config()['backbone']
    backbone['init_cfg'] = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    return model, dict(type='cae_mm.CAEFeatures', backbone=backbone, patch_size=4)


def normalise(images, mean, std):
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def at(features, ids):
    return torch.stack([row[i] for row, i in zip(features, ids, strict=True)])


def load(config):
    target = MODELS.build(config)
    target.init_weights()
    return target.eval()


def test_of_clip_are_the_projected_patches(clip):
    folder, model = clip
    target = load(dict(type='cae_mm.CLIPFeatures', folder=str(folder), patch_size=8))
    images = torch.rand(2, 3, 16, 16)
    tokens = model.vision_model(normalise(images, *CLIP)).last_hidden_state
    want = model.visual_projection(model.vision_model.post_layernorm(tokens))[:, 1:]
    ids = torch.tensor([[0, 3], [2, 1]])
    found = target.targets(images, ids, (2, 2))
    torch.testing.assert_close(found, at(want, ids))
    assert target.out_dims(16) == 12 and not found.requires_grad
    if 'interpolate_pos_encoding' in signature(CLIPVisionModel.forward).parameters:  # new ones
        assert target.targets(torch.rand(2, 3, 16, 24), IDS, WIDE).shape == (2, 3, 12)


def test_of_clip_in_a_pickle_with_its_own_normalisation(clip):
    folder, model = clip
    torch.save(model.state_dict(), folder / 'pytorch_model.bin')
    (folder / 'model.safetensors').unlink()
    said = dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.1, 0.2, 0.4])
    (folder / 'preprocessor_config.json').write_text(json.dumps(said))
    target = load(dict(type='cae_mm.CLIPFeatures', folder=str(folder), patch_size=8))
    assert target.mean.flatten().tolist() == pytest.approx(said['image_mean'])
    assert target.std.flatten().tolist() == pytest.approx(said['image_std'])
    weights = target.model.visual_projection.weight
    torch.testing.assert_close(weights, model.visual_projection.weight, rtol=0, atol=0)


@pytest.mark.parametrize('layer_norm', [False, True])
def test_of_timm_are_its_patch_tokens(tmp_path, layer_norm):
    """Not square, and without the classifier that the file has."""
    torch.manual_seed(0)
    model = timm.create_model(TIMM['name'], **TIMM['options']).eval()
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    options = dict(checkpoint=str(tmp_path / 'model.safetensors'), layer_norm=layer_norm)
    target = load(dict(type='cae_mm.TimmFeatures', **TIMM, **options))
    images = torch.rand(2, 3, 32, 48)
    cfg = model.pretrained_cfg
    want = model.forward_features(normalise(images, cfg['mean'], cfg['std']))
    want = at(want[:, model.num_prefix_tokens :], IDS)
    want = F.layer_norm(want, want.shape[-1:]) if layer_norm else want
    torch.testing.assert_close(target.targets(images, IDS, WIDE), want)
    assert target.out_dims(16) == want.shape[-1]


def test_of_a_convolutional_net_are_the_cells_of_its_last_map():
    target = TimmFeatures(name='test_convnext', checkpoint='', patch_size=32).eval()
    images = torch.rand(2, 3, 64, 96)
    found = target.targets(images, IDS, WIDE)
    cfg = target.model.pretrained_cfg
    maps = target.model.forward_features(normalise(images, cfg['mean'], cfg['std']))
    maps = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, at(maps, IDS))


def test_of_an_own_encoder_are_its_normed_tokens(tmp_path):
    model, config = cae_teacher(tmp_path / 'first.pth')
    target, images = load(config), torch.rand(2, 3, 16, 16)
    want = model.eval().backbone.forward_features(normalise(images, *IMAGENET))[:, 1:]
    torch.testing.assert_close(target.targets(images, IDS, GRID), at(want, IDS))
    assert target.out_dims(16) == WIDTH


def test_of_an_own_encoder_are_normalised_as_its_file_says(tmp_path):
    said = dict(mean=(51.0, 102.0, 153.0), std=(25.5, 51.0, 127.5))
    model, config = cae_teacher(tmp_path / 'first.pth', **said)
    target, images = load(config | dict(mean=[0.5] * 3)), torch.rand(2, 3, 16, 16)
    want = normalise(images, (0.2, 0.4, 0.6), (0.1, 0.2, 0.5))
    want = model.eval().backbone.forward_features(want)[:, 1:]
    torch.testing.assert_close(target.targets(images, IDS, GRID), at(want, IDS))


def test_of_an_own_encoder_whose_file_says_nothing(tmp_path, log):
    _, config = cae_teacher(tmp_path / 'first.pth', mean=None)
    target = load(config | dict(mean=[0.5, 0.4, 0.3], std=[0.1, 0.2, 0.4]))
    assert target.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert target.std.flatten().tolist() == pytest.approx([0.1, 0.2, 0.4])
    assert 'does not say how its images were normalised: CAEFeatures.mean counts' in log.text
    del config['backbone']['init_cfg']
    load(config)
    assert 'no init_cfg: its random weights make poor targets' in log.text


def cae_v2(config, **changes):
    head = dict(type='cae_mm.CAEPretrainHead', cosine=True, align_weight=0)
    neck = dict(decoder_depth=0, out_dims=WIDTH)
    return build_cae(target_generator=config, head=head, neck=neck, **changes)


def batch():
    views, samples = make_batch()
    second = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return [views[0], second], samples


def test_cae_v2_is_the_mean_of_1_minus_cosine_over_all_patches(tmp_path):
    _, config = cae_teacher(tmp_path / 'first.pth')
    model = cae_v2(config, visible_targets=True).eval()
    views, samples = batch()
    losses = model(views, samples, mode='loss')
    masks = torch.stack([sample.mask for sample in samples])
    y_m = model.reconstruct(views[0], masks)
    total = 0.0
    for b, mask in enumerate(masks):
        v, m = (~mask).nonzero().flatten()[None], mask.nonzero().flatten()[None]
        y_v = model.neck.output(model.encode(views[0][b : b + 1], v))
        for y, ids in ((y_m[b : b + 1], m), (y_v, v)):
            target = model.target_generator.targets(views[1][b : b + 1], ids, GRID)
            unit = [x / x.norm(dim=-1, keepdim=True) for x in (y, target)]
            total += (1 - (unit[0] * unit[1]).sum(-1)).sum() / masks.numel()
    torch.testing.assert_close(losses['loss_main'], total)
    assert set(losses) == {'loss_main', 'latent_std'}  # no alignment


def test_only_encoder_and_neck_learn(tmp_path):
    _, config = cae_teacher(tmp_path / 'first.pth')
    model = cae_v2(config, visible_targets=True).train()
    assert not model.target_generator.backbone.training
    before = [p.clone() for p in model.target_generator.parameters()]
    model(*batch(), mode='loss')['loss_main'].backward()
    assert all(p.grad is None for p in model.target_generator.parameters())
    assert all(p.grad is not None for p in model.neck.parameters())
    assert all(p.grad is not None for p in model.backbone.parameters())
    assert all(map(torch.equal, before, model.target_generator.parameters()))
    state = model.state_dict()
    assert not any('target_generator' in key for key in state)
    again = cae_v2(config, visible_targets=True)
    again.load_state_dict(state)  # strict, as in resuming
    for key, value in again.eval()(*batch(), mode='loss').items():
        assert torch.equal(value, model.eval()(*batch(), mode='loss')[key])


def test_visible_tokens_count_in_the_loss_but_not_in_the_metrics():
    views, samples = make_batch()
    one, both = (
        build_cae(visible_targets=on).eval()(views, samples, mode='loss') for on in (False, True)
    )
    assert one.keys() == both.keys()
    assert one['loss_main'] != both['loss_main']
    for name in ('loss_align', 'token_acc', 'target_codes'):
        assert torch.equal(one[name], both[name])


def test_visible_patches_and_a_share_of_the_masked_ones():
    """Mean over 9 visible and 3 of 7 masked patches, in that model of a linear layer as decoder."""
    options = dict(neck=dict(decoder_depth=0), visible_targets=True, predicted_share=0.5)
    model = build_cae(**options).eval()
    views, samples = make_batch()
    masks = torch.stack([sample.mask for sample in samples])
    ids_v, ids_m = split_mask(masks)
    torch.manual_seed(1)
    losses = model(views, samples, mode='loss')
    torch.manual_seed(1)
    ids_m = draw_ids(ids_m, 0.5)
    z_v = model.encode(views[0], ids_v)
    y = [model.neck.output(z) for z in (z_v, model.neck.regress(z_v, ids_v, ids_m, GRID))]
    tokens = [model.target_generator.targets(views[1], ids, GRID) for ids in (ids_v, ids_m)]
    want = F.cross_entropy(torch.cat(y, dim=1).flatten(0, 1), torch.cat(tokens, dim=1).flatten())
    torch.testing.assert_close(losses['loss_main'], want)


class TestErrors:
    def test_second_view_of_another_size(self):
        target = TimmFeatures(**TIMM, checkpoint='')
        with pytest.raises(ValueError, match=r'2x3 patches, .* 16 pixels .* 32x32: .*=\(32, 48\)'):
            target.targets(torch.rand(2, 3, 32, 32), IDS, WIDE)

    def test_patch_size_of_another_model(self, clip):
        with pytest.raises(ValueError, match=r'patch_size is 16, .* 8x8 pixels: set .*=8'):
            CLIPFeatures(folder=str(clip[0]), patch_size=16)
        with pytest.raises(ValueError, match=r'patch_size is 16, .* 4x4 pixels'):
            CAEFeatures(backbone=cae_config()['backbone'], patch_size=16)
        with pytest.raises(ValueError, match=r'patch_size is 8, .* 16x16 pixels'):
            TimmFeatures(**TIMM | dict(patch_size=8), checkpoint='')

    def test_missing_files(self, tmp_path):
        message = 'no weights for CLIPFeatures at .*config.json. model.target_generator.folder '
        with pytest.raises(FileNotFoundError, match=message):
            CLIPFeatures(folder=str(tmp_path), patch_size=16)
        target = TimmFeatures(**TIMM, checkpoint=str(tmp_path / 'a.safetensors'))
        with pytest.raises(FileNotFoundError, match='TimmFeatures at .*a.safetensors'):
            target.init_weights()

    def test_encoders_of_bgr(self, tmp_path):
        _, config = cae_teacher(tmp_path / 'first.pth', to_rgb=False)
        with pytest.raises(ValueError, match='first.pth was made with BGR images, CAEFeatures'):
            load(config)

    def test_weights_of_another_model(self, clip):
        folder, _ = clip
        state = load_file(folder / 'model.safetensors')
        del state['visual_projection.weight']
        save_file(state, folder / 'model.safetensors')
        target = CLIPFeatures(folder=str(folder), patch_size=8)
        with pytest.raises(ValueError, match='not fit CLIPFeatures: 1 keys missing: visual_proj'):
            target.init_weights()

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="timm has no model 'vit': see timm.list_models"):
            TimmFeatures(name='vit', checkpoint='', patch_size=16)

    @pytest.mark.parametrize(
        ('package', 'build'),
        [
            ('timm', lambda: TimmFeatures(**TIMM, checkpoint='')),
            ('transformers', lambda: CLIPFeatures(folder='none', patch_size=16)),
        ],
    )
    def test_missing_package(self, monkeypatch, package, build):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"needs {package}: pip install 'cae-mm\[export\]'"):
            build()

    def test_cosine_of_tokens(self):
        model = build_cae(head=dict(type='cae_mm.CAEPretrainHead', cosine=True))
        with pytest.raises(ValueError, match='cosine=True is for features, but .* tokens'):
            model(*make_batch(), mode='loss')

    @pytest.mark.parametrize('other', [dict(visible_targets=True), dict(predicted_share=0.5)])
    def test_complementary_masks_predict_each_patch_once(self, other):
        with pytest.raises(ValueError, match='each patch once, .* predicted_share nor visible_tar'):
            build_cae(complementary_masks=True, **other)
