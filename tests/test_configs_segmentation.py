"""Every config of mmsegmentation builds, trains a step and is judged when shrunk; recipes hold."""

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import Runner
from PIL import Image

pytest.importorskip(
    'mmseg.models',
    reason='needs mmsegmentation: make setup EXTRAS=segmentation',
    exc_type=ImportError,
)

from cae_mm.engine import CAERunner  # noqa: E402
from cae_mm.engine.data import check_datasets  # noqa: E402
from cae_mm.engine.settings import apply_settings  # noqa: E402

pytestmark = pytest.mark.usefixtures('plain_config_text')
ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / 'configs' / 'upernet').glob('*.py'))
RECIPES = [path for path in CONFIGS if '160k' in path.stem]
BASE = ROOT / 'configs/upernet/cae_vit-base_upernet_8xb2-amp-160k_ade20k-512x512.py'
CUSTOM = ROOT / 'configs/upernet/cae_vit-base_upernet_4xb4-amp-20k_custom-512x512.py'
MINI = ROOT / 'configs/upernet/cae_vit-mini_upernet_1xb2-amp-800i_ade20k-256x256.py'
MICRO = [path for path in CONFIGS if 'vit-micro' in path.stem]
HEIGHT, WIDTH = 40, 50
CROP = (64, 64)


def name_of(path):
    return path.stem


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Two images with masks for training and for validation, as ADE20K's and as own."""
    root = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    layouts = {'ade': ('images', 'annotations', 'training', 'validation', 151)}
    layouts['custom'] = ('images', 'masks', 'train', 'val', 3)
    for name, (images, masks, *splits, values) in layouts.items():
        for split in splits:
            for kind in (images, masks):
                (root / name / kind / split).mkdir(parents=True)
            for i in range(2):
                image = rng.integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
                mask = rng.integers(values, size=(HEIGHT, WIDTH), dtype=np.uint8)
                Image.fromarray(image).save(root / name / images / split / f'{i}.jpg')
                Image.fromarray(mask).save(root / name / masks / split / f'{i}.png')
    return root


def shrink(cfg: Config, data: Path, work_dir: Path) -> Config:
    """The same run with a tiny model, tiny images and two iterations of two images."""
    cfg.work_dir = str(work_dir)
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[name].update(num_workers=0, persistent_workers=False)
    own = cfg.train_dataloader.dataset.type == 'mmseg.BaseSegDataset'
    root = str(data / ('custom' if own else 'ade'))
    if 'coco' in cfg.train_dataloader.dataset.data_prefix.img_path:
        for loader, split in ((cfg.train_dataloader, 'train'), (cfg.val_dataloader, 'val')):
            folders = dict(img_path=f'images/{split}', seg_map_path=f'masks/{split}')
            loader.dataset.data_prefix = folders
    apply_settings(cfg, img_size=CROP, data_root=root, batch_size=2)
    cfg.auto_scale_lr.base_batch_size = 2
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.default_hooks.checkpoint.interval = 2
    model = cfg.model
    model.backbone.update(out_indices=(0, 1, 2, 3), init_cfg=None)
    arch = dict(embed_dims=16, num_heads=2)
    if model.backbone.type == 'cae_mm.CAEViT':
        arch |= dict(depth=4, layer_scale=0.1)
        model.backbone.update(arch=arch, pretrain_img_size=32)
    else:
        model.backbone.arch = arch | dict(num_layers=4, feedforward_channels=32)
    model.neck.in_channels = 16
    model.decode_head.update(in_channels=[16] * 4, channels=8)
    model.auxiliary_head.update(in_channels=16, channels=8)
    return cfg


@pytest.mark.parametrize('path', CONFIGS, ids=name_of)
def test_config_trains_and_is_judged_when_shrunk(path, data, tmp_path):
    cfg = shrink(Config.fromfile(path), data, tmp_path)
    cfg.param_scheduler = []
    runner = CAERunner.from_cfg(cfg)
    runner.model.init_weights()
    before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    runner._init_model_weights = lambda: None
    runner.train()
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    moved = {n for n, p in runner.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == before.keys()
    assert 0 <= runner.message_hub.get_scalar('val/mIoU').current() <= 100
    assert (tmp_path / 'iter_2.pth').exists()


@pytest.mark.parametrize('path', CONFIGS, ids=name_of)
def test_config_builds_at_full_size(path):
    cfg = Config.fromfile(path)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    crop = cfg.model.test_cfg.crop_size
    with DefaultScope.overwrite_default_scope('mmseg'):
        maps = model.eval().extract_feat(torch.zeros(1, 3, *crop, device='meta'))
    width = model.backbone.embed_dims
    assert [tuple(x.shape) for x in maps] == [
        (1, width, crop[0] // stride, crop[1] // stride) for stride in (4, 8, 16, 32)
    ]
    logits = model.decode_head(maps)
    classes = {CUSTOM: 3, MINI: 5, **dict.fromkeys(MICRO, 6)}.get(path, 150)
    assert logits.shape == (1, classes, crop[0] // 4, crop[1] // 4)
    assert model.auxiliary_head(maps).shape == (1, classes, crop[0] // 16, crop[1] // 16)


@pytest.mark.parametrize('path', RECIPES, ids=name_of)
def test_recipe_of_the_official_code(path):
    """configs_local/cae/upernet of the official code, and the paper's section on ADE20K."""
    cfg = Config.fromfile(path)
    model, wrapper = cfg.model, cfg.optim_wrapper
    large = 'large' in path.stem
    width = 1024 if large else 768
    assert model.backbone.arch == ('large' if large else 'base')
    assert model.backbone.out_indices == ((7, 11, 15, 23) if large else (3, 5, 7, 11))
    assert model.backbone.drop_path_rate == (0.15 if large else 0.1)
    assert (model.backbone.img_size, model.backbone.pretrain_img_size) == (512, 224)
    assert model.backbone.use_rel_pos_bias and not model.backbone.final_norm
    assert model.decode_head.channels == width
    assert model.decode_head.in_channels == [width] * 4
    assert model.decode_head.pool_scales == (1, 2, 3, 6)
    assert model.decode_head.loss_decode.loss_weight == 1.0
    aux = model.auxiliary_head
    assert (aux.in_index, aux.num_convs, aux.channels) == (2, 1, 256)
    assert aux.loss_decode.loss_weight == 0.4
    for part in (model.neck, model.decode_head, aux):
        assert part.norm_cfg.type == 'SyncBN'
    assert model.test_cfg == dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
    assert model.data_preprocessor.mean == [123.675, 116.28, 103.53]
    assert model.data_preprocessor.std == [58.395, 57.12, 57.375]

    epochs = int(model.backbone.init_cfg.checkpoint.split('epoch_')[1].removesuffix('.pth'))
    assert epochs == int(path.stem.partition('_')[0].removeprefix('cae').strip('-e') or 300)
    lr = 4e-5 if large else {300: 3e-4, 800: 2e-4, 1600: 1e-4}[epochs]
    optimizer = wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', lr, 0.05)
    assert optimizer.betas == (0.9, 0.999)
    assert wrapper.paramwise_cfg.layer_decay_rate == (0.95 if large else 0.65)
    assert 'clip_grad' not in wrapper
    assert cfg.train_dataloader.batch_size == 2 and 'accumulative_counts' not in wrapper
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=8 * 2)
    assert cfg.train_cfg.max_iters == 160_000
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval
    warmup, poly = cfg.param_scheduler
    assert (warmup.end, poly.end) == (1500 + 1, 160_000 + 1)


def test_learning_rate_is_that_of_mmcv():
    """The official poly policy with linear warm-up: both factors from the first iteration on."""
    cfg = Config.fromfile(BASE)
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=3e-4)
    from mmengine.registry import PARAM_SCHEDULERS

    schedulers = [
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=optimizer))
        for scheduler in cfg.param_scheduler
    ]
    optimizer.step()  # mmengine warns otherwise
    for i in range(2000):
        expected = 3e-4 * (1 - i / 160_000)
        if i < 1500:
            expected *= 1 - (1 - i / 1500) * (1 - 1e-6)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(expected, rel=1e-9), i
        for scheduler in schedulers:
            scheduler.step()


def test_learning_rates_of_the_layers(data, tmp_path):
    cfg = shrink(Config.fromfile(BASE), data, tmp_path)
    runner = CAERunner.from_cfg(cfg)
    wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    groups = {id(p): group for group in wrapper.optimizer.param_groups for p in group['params']}
    expected = {
        'backbone.patch_embed.proj.weight': (0.65**5, 0.05),
        'backbone.cls_token': (0.65**5, 0),
        'backbone.blocks.0.attn.qkv.weight': (0.65**4, 0.05),
        'backbone.blocks.3.mlp.fc1.weight': (0.65, 0.05),
        'backbone.blocks.3.attn.relative_position_bias_table': (0.65, 0),
        'backbone.blocks.3.gamma_1': (0.65, 0),
        'neck.levels.0.0.weight': (1, 0.05),
        'decode_head.conv_seg.weight': (1, 0.05),
        'decode_head.conv_seg.bias': (1, 0),
        'auxiliary_head.conv_seg.weight': (1, 0.05),
    }
    params = dict(runner.model.named_parameters())
    assert len(groups) == len(params)
    for name, (scale, decay) in expected.items():
        group = groups[id(params[name])]
        assert (group['lr'], group['weight_decay']) == pytest.approx((3e-4 * scale, decay)), name


@pytest.mark.parametrize(('path', 'ignored'), [(BASE, 0), (CUSTOM, None)])
def test_labels_that_the_model_sees(path, ignored, data, tmp_path):
    """ADE20K's 0 is ignored and 1 becomes 0; an own dataset keeps its values."""
    cfg = shrink(Config.fromfile(path), data, tmp_path)
    with DefaultScope.overwrite_default_scope('mmseg'):
        dataset = Runner.build_dataloader(cfg.val_dataloader).dataset
    sample = dataset[0]['data_samples']
    labels = np.array(Image.open(sample.seg_map_path)).astype(int)
    if ignored is not None:
        labels = np.where(labels == ignored, 255, labels - 1)
    assert (sample.gt_sem_seg.data[0].numpy() == labels).all()
    assert len(dataset.metainfo['classes']) == cfg.model.decode_head.num_classes


def test_small_images_are_judged_at_their_own_size(data, tmp_path):
    """They are filled up to the crop, and what was filled up is cut off again."""
    cfg = shrink(Config.fromfile(CUSTOM), data, tmp_path)
    apply_settings(cfg, transforms=dict(Resize=dict(scale=(WIDTH, HEIGHT))))
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model).eval()
        loader = Runner.build_dataloader(cfg.test_dataloader)
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2:]))
    with torch.no_grad():
        [sample] = model.test_step(next(iter(loader)))
    assert seen == [CROP]
    assert sample.pred_sem_seg.data.shape == (1, HEIGHT, WIDTH)


def test_test_tool_judges_and_paints(data, tmp_path, monkeypatch):
    """Ground truth at the left, prediction at the right, in exactly the folder that was named."""
    cfg = shrink(Config.fromfile(CUSTOM), data, tmp_path / 'work')
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    lines = [f'{key} = {value!r}' for key, value in cfg.to_dict().items()]
    (tmp_path / 'config.py').write_text('\n'.join(lines))
    options = ['config.py', 'weights.pth', '--out', 'metrics.json', '--show-dir', 'shown']
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['test.py', *options])
    runpy.run_path(str(ROOT / 'tools' / 'test.py'), run_name='__main__')
    assert 0 <= json.loads(Path('metrics.json').read_text())['mIoU'] <= 100
    pictures = sorted(Path('shown').iterdir())
    assert len(pictures) == 2
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.size == (2 * WIDTH, HEIGHT)


# mmengine's, of a visualizer without a folder, and of its own reading under torch 2.4
@pytest.mark.filterwarnings('ignore:Failed to add:UserWarning:mmengine')
@pytest.mark.filterwarnings('ignore:You are using `torch.load`:FutureWarning:mmengine')
def test_inferencers_of_mmseg_take_configs_and_checkpoints(data, tmp_path):
    from mmseg.apis import MMSegInferencer, inference_model, init_model

    cfg = shrink(Config.fromfile(CUSTOM), data, tmp_path)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model)
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline  # what init_model reads
    metainfo = dict(cfg.dataset.metainfo)
    checkpoint = dict(state_dict=model.state_dict(), meta=dict(dataset_meta=metainfo))
    torch.save(checkpoint, tmp_path / 'weights.pth')
    image = str(data / 'custom' / 'images' / 'val' / '0.jpg')
    model = init_model(cfg, str(tmp_path / 'weights.pth'), device='cpu')
    prediction = inference_model(model, image).pred_sem_seg.data[0].numpy()
    assert prediction.shape == (HEIGHT, WIDTH)
    infer = MMSegInferencer(cfg, str(tmp_path / 'weights.pth'), device='cpu')
    result = infer(image, out_dir=str(tmp_path / 'out'))
    assert (result['predictions'] == prediction).all()
    assert list((tmp_path / 'out').rglob('*.png'))


@pytest.mark.parametrize('loader', ['train_dataloader', 'val_dataloader'])
def test_mask_of_another_size_than_its_image_is_named(tmp_path, loader):
    """Here an image that is stored on its side, as cameras do, beside a mask that is not."""
    own = Config.fromfile(CUSTOM)[loader].dataset
    folders = [tmp_path / own.data_prefix[name] for name in ('img_path', 'seg_map_path')]
    for folder in folders:
        folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (WIDTH, HEIGHT)).save(folders[0] / 'a.jpg', exif=exif)
    Image.new('L', (WIDTH, HEIGHT)).save(folders[1] / 'a.png')
    with DefaultScope.overwrite_default_scope('mmseg'):
        dataset = DATASETS.build(dict(own, data_root=str(tmp_path)))
    message = rf'{folders[1]}/a.png has shape \(40, 50\), its image {folders[0]}/a.jpg \(50, 40\)'
    with pytest.raises(ValueError, match=message):
        dataset[0]


def test_folder_without_images_is_named(tmp_path):
    """Of a wrong ending; mmsegmentation cannot put nothing together."""
    cfg = Config.fromfile(CUSTOM)
    for folder in (cfg.train_images, cfg.val_images):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / 'a.JPG').touch()
    apply_settings(cfg, data_root=str(tmp_path))
    message = f'no images in {tmp_path}/images/val: none of 1 files ends with .jpg. .*img_suffix'
    with (
        DefaultScope.overwrite_default_scope('mmseg'),
        pytest.raises(FileNotFoundError, match=message),
    ):
        check_datasets(cfg)
