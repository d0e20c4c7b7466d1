import copy

import pytest
import torch
from builders import build_cae, cae_config
from mmengine.config import Config
from torch import nn

from cae_mm import precision
from cae_mm.evaluation.encoder import Encoder, load_encoder, read_normalizer, read_size

VIT = dict(
    type='mmpretrain.VisionTransformer',
    arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32),
    img_size=16,
    patch_size=4,
    out_type='avg_featmap',
)
RESNET = dict(type='ResNet', depth=18, stem_channels=8, base_channels=8, out_indices=[3])
NORMALIZATION = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=True)


@pytest.fixture
def images():
    return torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)


def load(cfg, checkpoint='random', **options):
    options = dict(features=('cls', 'mean'), precision='float32') | options
    return load_encoder(cfg, checkpoint, **options)


def classifier(backbone):
    model = dict(type='ImageClassifier', backbone=backbone)
    return Config(dict(model=model, data_preprocessor=NORMALIZATION, default_scope='mmpretrain'))


def test_features_of_cae(tmp_path, images):
    model = build_cae().eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'epoch_1.pth')
    # neither what the config says of outputs nor its init_cfg counts
    cfg = Config(dict(model=cae_config()))
    cfg.model.backbone.update(out_type='featmap', init_cfg=dict(type='Pretrained', checkpoint='x'))
    encoder = load(cfg, tmp_path / 'epoch_1.pth')
    normal = model.data_preprocessor({'inputs': images})['inputs'][0]
    with torch.no_grad():
        tokens = model.backbone.forward_features(normal)
    expected = torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
    torch.testing.assert_close(encoder(images), expected)
    only_mean = load(cfg, tmp_path / 'epoch_1.pth', features=['mean'])
    torch.testing.assert_close(only_mean(images), expected[:, 1:])


def test_features_of_another_vit(images):
    cfg = classifier(VIT)
    encoder = load(cfg)
    rgb = images.flip(1).float()
    mean, std = (torch.tensor(NORMALIZATION[key]).view(3, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        [tokens] = encoder.backbone((rgb - mean) / std)  # raw, whatever the config says
    expected = torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
    torch.testing.assert_close(encoder(images), expected)


def test_features_of_mae_are_those_of_whole_images(tmp_path, images):
    """From the pretraining config and its checkpoint; as of the same weights in a plain ViT."""
    arch = VIT['arch']
    mae = dict(type='mmpretrain.MAEViT', arch=arch, img_size=16, patch_size=4)
    cfg = classifier(mae)
    weights = load(cfg).backbone.state_dict()
    torch.save({f'backbone.{key}': value for key, value in weights.items()}, tmp_path / 'mae.pth')
    actual = load(cfg, tmp_path / 'mae.pth')(images)
    plain = load(classifier(VIT | dict(out_type='cls_token')), tmp_path / 'mae.pth')
    torch.testing.assert_close(actual, plain(images))


MAE = dict(type='mmpretrain.MAEViT', arch=VIT['arch'], img_size=16, patch_size=4)


@pytest.mark.parametrize(
    ('cfg', 'blocks'),
    [
        pytest.param(Config(dict(model=cae_config())), 'blocks', id='cae'),
        pytest.param(classifier(MAE), 'layers', id='mae'),
        pytest.param(classifier(VIT), 'layers', id='vit'),
    ],
)
def test_features_of_a_block_in_between(images, cfg, blocks):
    """Its own output, without the final norm."""
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.out_indices = 0
    encoder, seen = load(cfg), []
    first = getattr(encoder.backbone, blocks)[0]
    first.register_forward_hook(lambda module, args, out: seen.append(out))
    features = encoder(images)
    [tokens] = seen
    expected = torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
    torch.testing.assert_close(features, expected)


def test_patches(images):
    """Tokens after the class token, a map row by row; their mean is the feature."""
    cae = load(Config(dict(model=cae_config())), features=['mean'])
    normal = cae.normalizer({'inputs': images})['inputs'][0]
    with torch.no_grad():
        expected = cae.backbone.forward_features(normal)[:, 1:]
    torch.testing.assert_close(cae.patches(images), expected)
    other = load(classifier(VIT), features=['mean'])
    assert other.patches(images).shape == (3, 16, 16)
    net = load(classifier(RESNET), features=['mean'])
    large = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        [maps] = net.backbone(net.normalizer({'inputs': large})['inputs'][0])
    assert maps.shape == (2, 64, 2, 3)
    torch.testing.assert_close(net.patches(large)[:, 4], maps[:, :, 1, 1])
    for encoder in (cae, other, net):
        mean = encoder.patches(images).mean(1, keepdim=True)
        torch.testing.assert_close(mean, encoder(images))


def test_features_of_a_convolutional_net(images):
    encoder = load(classifier(RESNET), features=['mean'])
    assert encoder(images).shape == (3, 1, 64)
    with pytest.raises(ValueError, match="ResNet has no class token: use the feature 'mean'"):
        load(classifier(RESNET))


def test_random_encoders_are_seeded(images):
    cfg = Config(dict(model=cae_config()))
    first, again, other = (load(cfg, seed=seed)(images) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_precision_is_that_of_the_device_or_asked_for(images, monkeypatch, dtype):
    monkeypatch.setattr(precision, '_for_cpu', lambda: precision.Precision(dtype, 'a test'))
    cfg = Config(dict(model=cae_config()))
    auto, full = load(cfg, precision='auto'), load(cfg)
    assert (auto.precision.dtype, full.precision.dtype) == (dtype, torch.float32)
    assert auto(images).dtype == full(images).dtype == torch.float32
    torch.testing.assert_close(auto(images), full(images), rtol=0.05, atol=0.05)
    assert torch.equal(auto(images), full(images)) is (dtype == torch.float32)
    with pytest.raises(ValueError, match="Unknown precision 'int8': choose one of"):
        load(cfg, precision='int8')


OURS = dict(type='cae_mm.CAEDataPreprocessor')
SEVEN = dict(mean=[7] * 3, std=[1] * 3)


@pytest.mark.parametrize(
    ('inside', 'at_top', 'mean', 'to_rgb'),
    [
        (cae_config(), None, 123.675, True),
        (cae_config(data_preprocessor=OURS), None, 123.675, True),
        (cae_config(data_preprocessor=OURS | dict(to_rgb=False)), None, 123.675, False),
        (dict(type='ImageClassifier'), NORMALIZATION, 1.0, True),
        (dict(data_preprocessor=SEVEN | dict(bgr_to_rgb=True)), None, 7, True),
        (dict(data_preprocessor=SEVEN), None, 7, False),
    ],
)
def test_normalisation_is_the_configs(inside, at_top, mean, to_rgb):
    normalizer = read_normalizer(Config(dict(model=inside, data_preprocessor=at_top)))
    assert normalizer.means[0].flatten()[0] == pytest.approx(mean)
    assert normalizer.to_rgb is to_rgb


def test_size_is_the_backbones():
    assert read_size(Config(dict(model=cae_config()))) == (16, 16)
    assert read_size(classifier(RESNET)) == (224, 224)


def test_what_cannot_be_used_is_said():
    with pytest.raises(ValueError, match='the config of this run has no model.backbone'):
        load(Config(dict(model=dict(type='cae_mm.DiscreteVAE'))))
    with pytest.raises(ValueError, match='has no data_preprocessor with mean and std'):
        load(Config(dict(model=dict(type='ImageClassifier', backbone=VIT))))
    with pytest.raises(ValueError, match="Unknown feature 'max': choose one of"):
        load(Config(dict(model=cae_config())), features=['max'])


class Flat(nn.Linear):
    def forward(self, x):
        return (x.flatten(1),)


def test_other_outputs_are_refused(images):
    encoder = Encoder(Flat(1, 1), Config(dict(model=cae_config())), ['mean'])
    with pytest.raises(ValueError, match=r'Flat returns neither tokens nor a map.*\(3, 768\): use'):
        encoder(images)


def test_weights_that_do_not_fit_are_named(tmp_path):
    torch.save(build_cae().backbone.state_dict(), tmp_path / 'encoder.pth')
    cfg = Config(dict(model=cae_config()))
    load(cfg, tmp_path / 'encoder.pth', prefix='')
    with pytest.raises(ValueError, match="does not fit CAEViT: .* under prefix=''"):
        load(cfg, tmp_path / 'encoder.pth')
