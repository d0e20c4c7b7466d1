"""Every config loads, builds at full size, and trains a step when shrunk; recipes hold."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from PIL import Image

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / 'configs').glob('*/*.py') if path.parent.name != '_base_')
PRETRAIN = [path for path in CONFIGS if path.parent.name == 'pretrain']
SMALL = dict(embed_dims=16, num_heads=2)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Four images in a folder with the sub-folder that the configs look into."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for i in range(4):
        path = folder / 'train' / f'{i}.png'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(256, size=(40, 50, 3), dtype=np.uint8)).save(path)
    return folder


def shrink(cfg: Config, images: Path, work_dir: Path) -> Config:
    """The same run with a tiny model, tiny images and two iterations of two images."""
    cfg.work_dir = str(work_dir)
    cfg.train_dataloader.update(batch_size=2, num_workers=0, pin_memory=False)
    cfg.train_dataloader.dataset.data_root = str(images)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
    cfg.param_scheduler = []
    cfg.default_hooks.checkpoint.interval = -1
    cfg.env_cfg.dist_cfg.backend = 'gloo'
    dvae = dict(vocab_size=8, codebook_dims=4, hidden_dims=4, num_res_blocks=1)
    if cfg.model.type == 'cae_mm.DiscreteVAE':
        cfg.model.update(dvae)
        cfg.train_dataloader.dataset.pipeline[2].scale = 16
        return cfg
    patch = cfg.model.backbone.patch_size
    crop = cfg.train_dataloader.dataset.pipeline[2]
    crop.size = cfg.model.backbone.img_size = 3 * patch
    crop.second_size = crop.get('second_size', 1) and 3 * 8
    cfg.model.backbone.arch = dict(**SMALL, depth=2, layer_scale=0.1)
    cfg.model.neck.update(in_dims=16, **SMALL, regressor_depth=1, decoder_depth=1)
    target = cfg.model.target_generator
    target.pop('init_cfg', None)
    if target.type != 'cae_mm.RGBTarget':
        cfg.model.neck.out_dims = 8
    if target.type == 'cae_mm.DALLEEncoder':
        target.update(n_hid=8, vocab_size=8, blocks_per_group=1)
    elif target.type == 'cae_mm.DiscreteVAE':
        target.update(dvae)
    return cfg


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_trains_a_step_when_shrunk(path, images, tmp_path):
    cfg = shrink(Config.fromfile(path), images, tmp_path)
    runner = Runner.from_cfg(cfg)
    runner.model.init_weights()
    runner.model._is_init = True  # what moves from here on, training moves
    before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    runner._init_model_weights = lambda: None
    runner.train()
    loss = runner.message_hub.get_scalar('train/loss')
    assert all(math.isfinite(value) for value in loss.data[0]) and len(loss.data[0]) == 2
    moved = {n for n, p in runner.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in runner.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_builds_at_full_size(path):
    cfg = Config.fromfile(path)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    if cfg.model.type == 'cae_mm.CAE':
        assert model.neck.mask_token.shape[-1] == cfg.model.neck.embed_dims
        linear = model.neck.projection
        assert isinstance(linear, torch.nn.Identity)  # all recipes: decoder as wide as encoder
        assert cfg.model.neck.in_dims == model.backbone.embed_dims


def by_name(part: str) -> list[Path]:
    return [path for path in PRETRAIN if part in path.stem]


@pytest.mark.parametrize('path', PRETRAIN, ids=lambda path: path.stem)
def test_recipe_of_the_paper(path):
    """Paper, "Training Details", and the official scripts."""
    cfg = Config.fromfile(path)
    custom = 'custom' in path.stem
    batch = 128 * 4 if custom else 2048
    epochs = int(path.stem.split('coslr-')[1].split('e_')[0])
    warmup, cosine = cfg.param_scheduler
    optimizer = cfg.optim_wrapper.optimizer
    lr = 1.5e-3 * batch / 2048
    assert optimizer.type == 'AdamW'
    assert optimizer.lr == pytest.approx(lr)
    assert (*optimizer.betas, optimizer.weight_decay) == (0.9, 0.999, 0.05)
    assert cfg.optim_wrapper.clip_grad.max_norm == 3.0
    # mmengine does not count the accumulation of 4
    assert cfg.auto_scale_lr.base_batch_size == (128 if custom else 2048)
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
    load, flip, crop, mask, pack = cfg.train_dataloader.dataset.pipeline
    assert flip.prob == 0.5
    assert crop.size == 224 and crop.second_size == (None if 'rgb' in path.stem else 112)
    assert mask.mask_ratio == 0.5
    rgb = 'rgb' in path.stem
    assert model.neck.out_dims == (768 if rgb else 8192)
    if rgb:
        return  # no second view
    preprocessor = MODELS.build(model.data_preprocessor)
    white = preprocessor.means.new_tensor([255.0])
    second = (white - preprocessor.means[1].flatten()) / preprocessor.stds[1].flatten()
    expected = 1.0 if 'dvae' in path.stem else 0.9  # 2 x - 1 against 0.8 x + 0.1
    assert second.tolist() == pytest.approx([expected] * 3)


def test_all_sizes_schedules_and_targets_are_there():
    for size in (
        'cae_vit-small',
        'cae_vit-base',
        'cae_vit-large',
        'cae-dvae_vit-base',
        'cae-rgb_vit-base',
    ):
        for epochs in (300, 800, 1600):
            assert by_name(f'{size}-p16_32xb64-amp-coslr-{epochs}e_in1k'), (size, epochs)


def test_model_index_names_existing_configs():
    import mmpretrain

    import cae_mm  # noqa: F401

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
