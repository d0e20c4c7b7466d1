"""Every config loads, builds at full size, and trains a step when shrunk; recipes hold."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image
from transformers import CLIPVisionConfig

from cae_mm.engine import CAERunner
from cae_mm.engine.settings import apply_settings
from cae_mm.models.archs import ARCHS

pytestmark = pytest.mark.usefixtures('plain_config_text')
ROOT = Path(__file__).parent.parent
FOLDERS = 'attentive demo finetune imagenette linear pretrain tokenizer'.split()
CONFIGS = [path for name in FOLDERS for path in sorted((ROOT / 'configs' / name).glob('*.py'))]
PRETRAIN = [path for path in CONFIGS if path.parent.name == 'pretrain']
OF_VIEW_1 = ('cae_mm.RGBTarget', 'cae_mm.HOGTarget', 'cae_mm.KMeansTokenizer')
PROBES = [path for path in CONFIGS if path.parent.name in ('linear', 'attentive')]
FINETUNE = [path for path in CONFIGS if path.parent.name == 'finetune']
# BatchNorm takes off what every image has, softmax what every key has; the query starts from zero
UNFELT_NAMES = 'attn.proj.bias attn.v.bias norm_k.bias norm_k.weight norm_q.weight norm_v.bias'
UNFELT = {f'head.{name}' for name in UNFELT_NAMES.split()}
SMALL = dict(embed_dims=16, num_heads=2)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Four images for training and two for evaluation, in the form of each dataset."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)

    def save(*names):
        for name in names:
            path = folder / name
            path.parent.mkdir(exist_ok=True, parents=True)
            Image.fromarray(rng.integers(256, size=(40, 50, 3), dtype=np.uint8)).save(path)

    classes = ('apple_pie', 'waffles')  # of Food-101
    save(*(f'train/{name}/{i}.png' for name in classes for i in range(2)))
    save(*(f'val/{name}/0.png' for name in classes))
    save(*(f'images/{name}/{i}.jpg' for name in classes for i in range(3)))
    lists = {
        'meta/train.txt': [f'{name}/{i}' for name in classes for i in range(2)],
        'meta/test.txt': [f'{name}/2' for name in classes],
    }
    for domain in ('clipart', 'sketch'):
        lists[f'{domain}_train.txt'] = [f'train/{name}/0.png {i}' for i, name in enumerate(classes)]
        lists[f'{domain}_test.txt'] = [f'val/{name}/0.png {i}' for i, name in enumerate(classes)]
    for name, lines in lists.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('\n'.join(lines))
    return folder


def shrink(cfg: Config, images: Path, work_dir: Path) -> Config:
    """The same run with a tiny model, tiny images and two iterations of two images."""
    cfg.work_dir = str(work_dir)
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if name in cfg:
            cfg[name].update(batch_size=2, num_workers=0)
            if cfg[name].dataset.type == 'mmpretrain.ImageNet':  # Food-101's lists are not its
                cfg[name].dataset.ann_file = f'{cfg[name].dataset.split}_in1k.txt'
                write_in1k_list(images, cfg[name].dataset.split)
    side = 3 * cfg.model.backbone.patch_size if 'backbone' in cfg.model else 16
    apply_settings(cfg, data_root=str(images), img_size=side)
    cfg.auto_scale_lr.base_batch_size = 2
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
    cfg.param_scheduler = []
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=-1)
    if cfg.model.type == 'mmpretrain.ImageClassifier':
        return shrink_classifier(cfg)
    if cfg.model.type == 'mmpretrain.MAE':
        return shrink_mae(cfg)
    dvae = dict(vocab_size=8, codebook_dims=4, hidden_dims=4, num_res_blocks=1)
    if cfg.model.type == 'cae_mm.DiscreteVAE':
        cfg.model.update(dvae)
        return cfg
    cfg.model.backbone.arch = dict(**SMALL, depth=2, layer_scale=0.1)
    depths = {name: min(cfg.model.neck[name], 1) for name in ('regressor_depth', 'decoder_depth')}
    cfg.model.neck.update(in_dims=16, **SMALL, **depths)
    target = cfg.model.target_generator
    target.pop('init_cfg', None)
    if target.type not in ('cae_mm.RGBTarget', 'cae_mm.HOGTarget'):
        cfg.model.neck.out_dims = 8
    if target.type == 'cae_mm.DALLEEncoder':
        target.update(n_hid=8, vocab_size=8, blocks_per_group=1)
    elif target.type == 'cae_mm.DiscreteVAE':
        target.update(dvae)
    elif target.type == 'cae_mm.CLIPFeatures':  # there is no CLIP here
        cfg.model.neck.out_dims = 16
        teacher = dict(type='cae_mm.CAEViT', arch=cfg.model.backbone.arch)
        cfg.model.target_generator = dict(
            type='cae_mm.CAEFeatures', backbone=teacher, patch_size=16
        )
    elif target.type == 'cae_mm.KMeansTokenizer':
        target.vocab_size = 8
        target.backbone.arch = cfg.model.backbone.arch
    return cfg


def write_in1k_list(images: Path, split: str) -> None:
    paths = sorted((images / split).glob('*/*.png'))
    lines = [f'{path.relative_to(images / split)} {i}' for i, path in enumerate(paths)]
    (images / f'{split}_in1k.txt').write_text('\n'.join(lines))


def shrink_classifier(cfg: Config) -> Config:
    backbone = cfg.model.backbone
    backbone.pop('init_cfg')
    if backbone.type == 'cae_mm.CAEViT':
        backbone.arch = dict(**SMALL, depth=2, layer_scale=0.1)
    else:
        backbone.arch = dict(**SMALL, num_layers=2, feedforward_channels=32)
    if 'frozen_stages' in backbone:
        backbone.frozen_stages = 2
    cfg.model.head.in_channels = 16
    if 'num_heads' in cfg.model.head:
        cfg.model.head.num_heads = 2
    return cfg


def shrink_mae(cfg: Config) -> Config:
    arch = dict(**SMALL, num_layers=2, feedforward_channels=32)
    cfg.model.backbone.arch = arch
    decoder = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    cfg.model.neck.update(num_patches=9, embed_dim=16, **decoder)
    return cfg


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_trains_a_step_when_shrunk(path, images, tmp_path):
    cfg = shrink(Config.fromfile(path), images, tmp_path)
    runner = CAERunner.from_cfg(cfg)
    runner.model.init_weights()
    runner.model._is_init = True  # what moves from here on, training moves
    before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    runner._init_model_weights = lambda: None
    runner.train()
    if 'test_cfg' in cfg:
        assert 0 <= runner.test()['accuracy/top1'] <= 100
    loss = runner.message_hub.get_scalar('train/loss')
    assert all(math.isfinite(value) for value in loss.data[0]) and len(loss.data[0]) == 2
    moved = {n for n, p in runner.model.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in runner.model.named_parameters() if p.requires_grad}
    assert moved | UNFELT == trained | UNFELT


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_builds_at_full_size(path, tmp_path):
    cfg = Config.fromfile(path)
    if 'cae-v2' in path.stem:  # CLIP ViT-B/16; the defaults are those of ViT-B/32
        CLIPVisionConfig(patch_size=16, projection_dim=512).save_pretrained(tmp_path)
        cfg.model.target_generator.folder = str(tmp_path)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    if cfg.model.type == 'cae_mm.CAE':
        assert model.neck.mask_token.shape[-1] == cfg.model.neck.embed_dims
        linear = model.neck.projection
        # all recipes but one: decoder as wide as encoder
        assert isinstance(linear, torch.nn.Identity) == ('cae-rgb-lean' not in path.stem)
        assert cfg.model.neck.in_dims == model.backbone.embed_dims


def test_recipe_of_cae_v2():
    """The official code, project/CAEv2/scripts/caev2_base_300e.sh."""
    [path] = (path for path in PRETRAIN if 'cae-v2' in path.stem)
    cfg = Config.fromfile(path)
    model = cfg.model
    assert (model.neck.regressor_depth, model.neck.decoder_depth) == (4, 0)
    assert model.neck.out_dims == 512
    assert model.head == dict(type='cae_mm.CAEPretrainHead', align_weight=0.0, cosine=True)
    assert model.visible_targets
    _, jitter, crop, mask, _ = cfg.train_dataloader.dataset.pipeline
    assert (jitter.brightness, jitter.contrast, jitter.saturation) == (0.4, 0.4, 0.4)
    assert (crop.size, crop.second_size, crop.second_interpolation) == (224, 224, 'bicubic')
    assert tuple(crop.scale) == (0.4, 1.0) and mask.mask_ratio == 0.5
    preprocessor = MODELS.build(model.data_preprocessor)
    assert (preprocessor.means[1] == 0).all() and (preprocessor.stds[1] == 255).all()


def test_recipe_for_few_images_is_that_of_the_study():
    [path] = (path for path in PRETRAIN if 'cae-rgb-lean' in path.stem)
    cfg = Config.fromfile(path)
    table = yaml.safe_load((ROOT / 'benchmarks/studies/imagenette64_choice.yml').read_text())
    chosen = table['rows']['cae-narrow-all/patch-init']['options']
    # the rate is that of another size and batch, see the config
    assert chosen.pop('optim_wrapper.optimizer.lr') == 2e-3
    target = dict(_delete_=True, **cfg.model.target_generator)
    assert chosen.pop('model.target_generator') == target
    assert chosen.pop('model.predicted_share') == 1 and 'predicted_share' not in cfg.model
    sizes = ('model.neck.embed_dims', 'model.neck.out_dims')
    values = {k: v for k, v in chosen.items() if not k.startswith('settings.') and k not in sizes}
    for key, value in values.items():
        place = cfg.to_dict()
        for part in key.split('.'):
            place = place[part]
        assert place == (tuple(value) if isinstance(value, list) else value), key
    assert cfg.model.neck.embed_dims * 2 == cfg.model.neck.in_dims == 384
    assert chosen['model.neck.embed_dims'] * 2 == 128  # of the study's encoder
    [mask] = (t for t in cfg.train_dataloader.dataset.pipeline if 'Mask' in t.type)
    assert mask.mask_ratio == chosen['settings.mask_ratio'] == 0.75
    assert mask.strategy == chosen['settings.transforms.CAEMaskGenerator.strategy'] == 'random'
    rates = cfg.optim_wrapper.optimizer.lr, cfg.param_scheduler[0].start_factor
    assert rates == (1e-3, 1e-3)


OTHERS = ('cae-v2', 'cae-rgb-lean')
PAPER = [path for path in PRETRAIN if not path.stem.startswith(OTHERS)]


@pytest.mark.parametrize('path', PAPER, ids=lambda path: path.stem)
def test_recipe_of_the_paper(path):
    """Paper, "Training Details", and the official scripts."""
    cfg = Config.fromfile(path)
    batch = 4 * 128 if 'custom' in path.stem else 2048
    assert batch_of_name(path) == batch
    epochs = int(path.stem.split('coslr-')[1].split('e_')[0])
    warmup, cosine = cfg.param_scheduler
    optimizer = cfg.optim_wrapper.optimizer
    lr = 1.5e-3 * batch / 2048
    assert optimizer.type == 'AdamW'
    assert optimizer.lr == pytest.approx(lr)
    assert (*optimizer.betas, optimizer.weight_decay) == (0.9, 0.999, 0.05)
    assert cfg.optim_wrapper.clip_grad.max_norm == 3.0
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=batch)
    assert cfg.train_cfg.max_epochs == epochs
    assert warmup.end == cosine.begin == {300: 10, 800: 20, 1600: 40}[epochs]
    assert warmup.start_factor * optimizer.lr == pytest.approx(1e-6)
    assert cosine.eta_min == 1e-5
    assert 'end' not in cosine and 'T_max' not in cosine

    model, arch = cfg.model, cfg.model.backbone.arch
    assert model.backbone.drop_path_rate == model.neck.drop_path_rate == 0.1
    assert model.neck.regressor_depth == model.neck.decoder_depth == 4
    width, heads = {'small': (384, 6), 'base': (768, 12), 'large': (1024, 16)}[arch]
    assert (model.neck.embed_dims, model.neck.num_heads) == (width, heads)
    assert model.neck.layer_scale == (1e-5 if arch == 'large' else 0.1)
    assert model.head.align_weight == 2.0
    load, crop, mask, pack = cfg.train_dataloader.dataset.pipeline
    assert load.on_error == 'skip'  # and all that is skipped is listed
    assert dict(type='cae_mm.UnreadableImagesHook') in cfg.custom_hooks
    assert crop.flip_prob == 0.5
    one_view = model.target_generator.type in OF_VIEW_1
    assert crop.size == 224 and crop.second_size == (None if one_view else 112)
    assert mask.mask_ratio == 0.5
    outputs = {'cae_mm.RGBTarget': 768, 'cae_mm.HOGTarget': 108}
    assert model.neck.out_dims == outputs.get(model.target_generator.type, 8192)
    if one_view:
        return
    preprocessor = MODELS.build(model.data_preprocessor)
    white = preprocessor.means.new_tensor([255.0])
    second = (white - preprocessor.means[1].flatten()) / preprocessor.stds[1].flatten()
    expected = 1.0 if 'dvae' in path.stem else 0.9  # 2 x - 1 against 0.8 x + 0.1
    assert second.tolist() == pytest.approx([expected] * 3)


def test_model_index_names_existing_configs():
    import mmpretrain

    import cae_mm.models  # noqa: F401

    names = mmpretrain.list_models('cae*_in1k')
    for path in PRETRAIN:
        assert (path.stem in names) == ('in1k' in path.stem), path.stem
    model = mmpretrain.get_model(
        'cae-rgb_vit-base-p16_32xb64-amp-coslr-300e_in1k',
        backbone=dict(arch='tiny'),
        neck=dict(in_dims=192),
    )
    assert type(model).__module__ == 'cae_mm.models.cae'
    with torch.no_grad():
        assert model.extract_feat(torch.zeros(1, 3, 224, 224))[0].shape == (1, 197, 192)


def batch_of_name(path: Path) -> int:
    """GPUs times images of each, which the config's recipe has to be."""
    gpus, images = map(int, re.search(r'_(\d+)xb(\d+)-', path.stem).groups())
    cfg = Config.fromfile(path)
    assert cfg.train_dataloader.batch_size == images
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=gpus * images)
    assert 'accumulative_counts' not in cfg.optim_wrapper
    return gpus * images


@pytest.mark.parametrize('path', PROBES, ids=lambda path: path.stem)
def test_recipe_of_probes(path):
    """Paper, "Linear Probing" and "Attentive Probing"; the official scripts."""
    cfg, batch = Config.fromfile(path), batch_of_name(path)
    lr = cfg.optim_wrapper.optimizer.lr
    optimizer, (warmup, cosine) = cfg.optim_wrapper.optimizer, cfg.param_scheduler
    linear = path.parent.name == 'linear'
    assert (lr, batch) == ((6.4, 16384) if linear else (0.4, 8192))
    assert optimizer.type == ('cae_mm.LARS' if linear else 'SGD')
    assert (optimizer.momentum, optimizer.weight_decay) == (0.9, 0.0)
    assert (cfg.train_cfg.max_epochs, warmup.end, cosine.begin) == (90, 10, 10)
    backbone, head = cfg.model.backbone, cfg.model.head
    arch = ARCHS[backbone.arch]
    assert backbone.frozen_stages == arch['depth'] and 'drop_path_rate' not in backbone
    assert head.in_channels == arch['embed_dims']
    assert backbone.out_type == ('cls_token' if linear else 'raw')
    assert linear or head.num_heads == arch['num_heads']
    steps = [step['type'] for step in cfg.train_dataloader.dataset.pipeline]
    assert steps[1:] == [
        'mmpretrain.RandomResizedCrop',
        'mmpretrain.RandomFlip',
        'mmpretrain.PackInputs',
    ]
    assert 'augments' not in cfg.model.get('train_cfg', {})
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.mean == [123.675, 116.28, 103.53]  # as in pretraining
    assert preprocessor.std == [58.395, 57.12, 57.375]


@pytest.mark.parametrize('path', FINETUNE, ids=lambda path: path.stem)
def test_recipe_of_finetuning(path):
    """Paper, "Fine-tuning", and the official scripts."""
    cfg, batch = Config.fromfile(path), batch_of_name(path)
    lr = cfg.optim_wrapper.optimizer.lr
    optimizer, (warmup, cosine) = cfg.optim_wrapper.optimizer, cfg.param_scheduler
    epochs, base_lr, decay, drop_path = {
        'small': (200, 1.6e-2, 0.75, 0.1),
        'base': (100, 8e-3, 0.65, 0.1),
        'large': (50, 2e-3, 0.75, 0.2),
    }[cfg.model.backbone.arch]
    assert batch == (1024 if 'custom' in path.stem else 4096)
    assert lr == pytest.approx(base_lr * batch / 4096)
    assert optimizer.type == 'AdamW' and optimizer.weight_decay == 0.05
    assert cfg.optim_wrapper.paramwise_cfg == dict(layer_decay_rate=decay)
    assert cfg.train_cfg.max_epochs == epochs and f'coslr-{epochs}e' in path.stem
    assert warmup.end == cosine.begin == 5
    assert warmup.start_factor == cosine.eta_min_ratio == pytest.approx(1e-6 / lr)
    backbone = cfg.model.backbone
    assert backbone.use_rel_pos_bias and backbone.drop_path_rate == drop_path
    assert backbone.out_type == 'avg_featmap'
    assert cfg.model.head.init_cfg.std == pytest.approx(2e-5)
    assert cfg.model.head.loss.label_smooth_val == 0.1
    augments = [(augment.type, augment.alpha) for augment in cfg.model.train_cfg.augments]
    assert augments == [('mmpretrain.Mixup', 0.8), ('mmpretrain.CutMix', 1.0)]
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    rand = dict(steps['mmpretrain.RandAugment'])  # rand-m9-mstd0.5-inc1
    assert rand.pop('policies') == 'timm_increasing' and rand.pop('num_policies') == 2
    assert (rand['magnitude_level'], rand['magnitude_std'], rand['total_level']) == (9, 0.5, 10)
    assert rand['hparams'] == dict(pad_val=[104, 116, 124], interpolation='bicubic')
    assert 'mmpretrain.ColorJitter' not in steps  # timm leaves it out
    assert steps['mmpretrain.RandomErasing'].erase_prob == 0.25
    assert cfg.model.head.num_classes == cfg.model.data_preprocessor.num_classes


def test_finetuning_starts_from_the_pretrained_encoder(images, tmp_path):
    """Final norm and blocks come from pretraining, position tables start from zero."""
    pretrained = MODELS.build(
        dict(
            type='cae_mm.CAEViT',
            arch=dict(**SMALL, depth=2, layer_scale=0.1),
            img_size=32,
            patch_size=16,
        )
    )
    for param in pretrained.parameters():
        torch.nn.init.normal_(param)
    state = {f'backbone.{key}': value for key, value in pretrained.state_dict().items()}
    torch.save(state, tmp_path / 'pretrained.pth')
    [path] = [
        path for path in FINETUNE if path.stem.endswith('base-p16_cae-pre_32xb128-coslr-100e_in1k')
    ]
    cfg = shrink(Config.fromfile(path), images, tmp_path)
    cfg.model.backbone.update(
        pretrain_img_size=32,
        init_cfg=dict(
            type='Pretrained', checkpoint=str(tmp_path / 'pretrained.pth'), prefix='backbone.'
        ),
    )
    model = MODELS.build(cfg.model)
    model.init_weights()
    loaded = model.backbone.state_dict()
    for key, value in pretrained.state_dict().items():
        assert torch.equal(loaded.pop(key), value), key
    assert len(loaded) == 2 and not any(table.any() for table in loaded.values())
    assert model.head.fc.weight.abs().max() < 2e-4
    model.eval()
    images = torch.randn(2, 3, 48, 48)
    feature = model.backbone(images)[0]
    pretrained.norm = torch.nn.Identity()
    [tokens] = pretrained(images)  # 48 px: positions resized from 2 x 2
    torch.testing.assert_close(feature, model.backbone.norm(tokens[:, 1:].mean(1)))


def expand(name: str) -> set[str]:
    """All names that a name with braces stands for, as in a shell."""
    head, brace, rest = name.partition('{')
    if not brace:
        return {name}
    choices, _, tail = rest.partition('}')
    return {name for choice in choices.split(',') for name in expand(head + choice + tail)}


def test_documented_configs_are_all_that_there_are():
    leaves = {str(path.relative_to(ROOT)) for path in (ROOT / 'configs').glob('[a-z]*/*.py')}
    for page in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')):
        for name in re.findall(r'configs/[a-z_]+/[\w{},-]+\.py', page.read_text()):
            assert expand(name) <= leaves, (page, name)
    table = re.findall(r'`([a-z_]+/[\w{},*-]+\.py)`', (ROOT / 'docs' / 'configs.md').read_text())
    patterns = [pattern for row in table for pattern in expand(row)]
    listed = {pattern: sorted((ROOT / 'configs').glob(pattern)) for pattern in patterns}
    assert all(listed.values())
    assert {str(path.relative_to(ROOT)) for paths in listed.values() for path in paths} == leaves
