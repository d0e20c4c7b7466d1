"""Every detection config builds at full size, and trains a step when shrunk; recipes hold."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

pytest.importorskip('mmcv.ops', reason='mmcv has no compiled operators', exc_type=ImportError)
pytest.importorskip('mmdet', reason='mmdetection is not installed')

from mmdet.datasets import CocoDataset  # noqa: E402

from cae_mm.engine import CAERunner  # noqa: E402
from cae_mm.engine.data import check_datasets  # noqa: E402
from cae_mm.engine.settings import apply_settings  # noqa: E402
from cae_mm.patches import patchify, unpadded_grids  # noqa: E402

pytestmark = pytest.mark.usefixtures('plain_config_text')
ROOT = Path(__file__).parent.parent
CONFIGS = sorted(
    path
    for folder in ('mask_rcnn', 'cascade_mask_rcnn', 'dino')
    for path in (ROOT / 'configs' / folder).glob('*.py')
)
RCNN = [path for path in CONFIGS if 'mask-rcnn' in path.stem]
PAPER = [path for path in RCNN if '1x_coco' in path.stem]
WIDTH = 32


@pytest.fixture(autouse=True)
def scope():
    """Set mmdetection's scope, as its own tools do, for this file's tests only."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    """Four images with a rectangle each, in a folder as COCO's, of its first class."""
    folder = tmp_path_factory.mktemp('coco')
    images, annotations = [], []
    for i in range(4):
        x, y, w, h = 8 + 4 * i, 8, 32, 24
        pixels = np.full((64, 80, 3), 40, dtype=np.uint8)
        pixels[y : y + h, x : x + w] = 220
        Image.fromarray(pixels).save(folder / f'{i}.png')
        images.append(dict(id=i, file_name=f'{i}.png', width=80, height=64))
        annotations.append(
            dict(
                id=i + 1,
                image_id=i,
                category_id=1,
                bbox=[x, y, w, h],
                area=w * h,
                iscrowd=0,
                segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
            )
        )
    for name, classes in (('coco', CocoDataset.METAINFO['classes']), ('custom', ['balloon'])):
        categories = [dict(id=i, name=name) for i, name in enumerate(classes, start=1)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (folder / f'{name}.json').write_text(json.dumps(content))
    return folder


def shrink_rcnn(model: Config) -> None:
    model.backbone.out_indices = (0, 1, 2, 3)
    model.neck[1].update(in_channels=[WIDTH] * 4, out_channels=WIDTH)
    model.rpn_head.update(in_channels=WIDTH, feat_channels=WIDTH)
    boxes = model.roi_head.bbox_head
    for head in boxes if isinstance(boxes, list) else [boxes]:
        head.update(in_channels=WIDTH, conv_out_channels=WIDTH, fc_out_channels=WIDTH)
    model.roi_head.mask_head.update(in_channels=WIDTH, conv_out_channels=WIDTH)
    for extractor in (model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor):
        extractor.out_channels = WIDTH
    stages = model.train_cfg.rcnn
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = 8
    model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 8
    model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=4)


def shrink_dino(model: Config) -> None:
    model.backbone.update(window_size=2, global_blocks=(1, 3))
    model.neck[1].in_channels = [WIDTH] * 3
    model.num_queries = 8
    model.encoder.num_layers = model.decoder.num_layers = 1
    model.dn_cfg.group_cfg.num_dn_queries = 2
    model.test_cfg.max_per_img = 8


def shrink(cfg: Config, coco: Path, work_dir: Path) -> Config:
    """The same run with a tiny model, images of 64 px and two iterations of two images."""
    cfg.work_dir = str(work_dir)
    annotations = 'custom.json' if 'metainfo' in cfg.train_dataloader.dataset else 'coco.json'
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0)
        loader.dataset.update(ann_file=annotations, data_prefix=dict(img=''))
    cfg.val_evaluator.update(
        ann_file=str(coco / annotations), outfile_prefix=str(work_dir / 'coco')
    )
    transforms = dict(Resize=dict(scale=(96, 64)))
    if 'mini' not in cfg.model.backbone.arch:
        transforms |= dict(
            RandomChoiceResize=dict(scales=[(64, 96)]), RandomCrop=dict(crop_size=(48, 56))
        )
    apply_settings(cfg, data_root=str(coco), transforms=transforms)
    cfg.train_cfg.max_epochs = cfg.train_cfg.val_interval = 1
    cfg.param_scheduler = []
    cfg.auto_scale_lr.base_batch_size = 2
    cfg.default_hooks.checkpoint.interval = -1
    model = cfg.model
    model.backbone.init_cfg = None
    model.backbone.arch = dict(embed_dims=WIDTH, depth=4, num_heads=2, layer_scale=0.1)
    model.backbone.patch_size = 16
    model.neck[0].in_channels = WIDTH
    (shrink_dino if model.type == 'DINO' else shrink_rcnn)(model)
    return cfg


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_trains_and_evaluates_when_shrunk(path, coco, tmp_path):
    cfg = shrink(Config.fromfile(path), coco, tmp_path)
    runner = CAERunner.from_cfg(cfg)
    runner.model.init_weights()
    runner._init_model_weights = lambda: None
    before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    runner.train()
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == 2 and all(math.isfinite(value) for value in losses)
    moved = {n for n, p in runner.model.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in runner.model.named_parameters() if p.requires_grad}
    # objects of one size belong to one level
    assert {name for name in trained - moved if 'fpn_convs' not in name} == set()
    results = {key for key in runner.message_hub.log_scalars if key.endswith('_mAP')}
    boxes, masks = 'val/coco/bbox_mAP', 'val/coco/segm_mAP'
    assert results == ({boxes} if cfg.model.type == 'DINO' else {boxes, masks})


def test_regions_of_a_batch_are_those_of_its_images(coco, tmp_path):
    """RoIAlign of mmcv takes all maps for contiguous, and says nothing when they are not."""
    path = ROOT / 'configs/mask_rcnn/cae_vit-base_mask-rcnn_gn_16xb2-amp-1x_coco.py'
    model = MODELS.build(shrink(Config.fromfile(path), coco, tmp_path).model).eval()
    pool = model.roi_head.bbox_roi_extractor
    images, box = torch.randn(2, 3, 64, 96), [8.0, 8.0, 60.0, 50.0]
    both = pool(model.extract_feat(images)[:4], torch.tensor([[0.0, *box], [1.0, *box]]))
    for image, regions in zip(images[:, None], both[:, None], strict=True):
        alone = pool(model.extract_feat(image)[:4], torch.tensor([[0.0, *box]]))
        torch.testing.assert_close(regions, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('path', [PAPER[0], CONFIGS[-1]], ids=lambda path: path.stem)
def test_padding_is_told_from_what_mmdetection_makes_of_images(path):
    preprocessor = MODELS.build(Config.fromfile(path).model.data_preprocessor)
    sizes = [(64, 96), (50, 33), (16, 17)]
    greys = (0, 103, 124)  # black, and ImageNet's means
    images = [
        torch.full((3, *size), grey, dtype=torch.uint8)
        for size, grey in zip(sizes, greys, strict=True)
    ]
    batch = preprocessor(dict(inputs=images, data_samples=None))['inputs']
    assert batch.shape == (3, 3, 64, 96)
    assert unpadded_grids(patchify(batch, 16), (4, 6)).tolist() == [[4, 6], [4, 3], [1, 2]]


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_builds_at_full_size(path):
    cfg = Config.fromfile(path)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    width = model.backbone.embed_dims
    pyramid, channels = model.neck
    assert all(conv.conv.in_channels == width for conv in list(channels.children())[0])
    assert all(p.shape[0] == width for p in pyramid.parameters())
    maps = model.eval().extract_feat(torch.zeros(1, 3, 256, 320, device='meta'))
    dino = cfg.model.type == 'DINO'
    strides = [8, 16, 32, 64] if dino else cfg.model.rpn_head.anchor_generator.strides
    assert [256 // x.shape[-2] for x in maps] == [320 // x.shape[-1] for x in maps] == strides
    if not dino:
        assert cfg.model.roi_head.bbox_roi_extractor.featmap_strides == strides[:4]
    assert cfg.model.backbone.out_type == 'featmap' and not cfg.model.backbone.final_norm
    assert not cfg.model.backbone.get('use_rel_pos_bias', False)  # official


@pytest.mark.parametrize('path', PAPER, ids=lambda path: path.stem)
def test_recipe_of_the_paper(path):
    """Paper, "Object detection and instance segmentation on COCO", and the official configs."""
    cfg = Config.fromfile(path)
    backbone = cfg.model.backbone
    lr, decay, drop_path = {
        'small': (3e-4, 0.75, 0.1),
        'base': (3e-4, 0.75, 0.2),
        'large': (2e-4, 0.8, 0.2),  # official: 0.85
    }[backbone.arch]
    wrapper = cfg.optim_wrapper
    assert cfg.train_dataloader.batch_size == 2 and 'accumulative_counts' not in wrapper
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=16 * 2)
    assert wrapper.optimizer == dict(
        type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=0.05, fused=True
    )
    assert wrapper.paramwise_cfg == dict(layer_decay_rate=decay)
    assert 'clip_grad' not in wrapper
    assert backbone.drop_path_rate == drop_path
    large = backbone.arch == 'large'
    assert backbone.out_indices == ((7, 11, 15, 23) if large else (3, 5, 7, 11))

    assert cfg.train_cfg.max_epochs == 12
    warmup, steps = cfg.param_scheduler
    assert (steps.milestones, steps.gamma) == ([9, 11], 0.1)
    assert (warmup.start_factor, warmup.end) == (1e-3, 500)

    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    direct, cropped = steps['RandomChoice'].transforms
    assert [scale for scale in direct[0].scales] == [(s, 1333) for s in range(480, 801, 32)]
    assert cropped[0].scales == [(400, 1333), (500, 1333), (600, 1333)]
    assert cropped[1].crop_size == (384, 600) and cropped[1].allow_negative_crop
    assert cropped[2] == direct[0]
    [resize] = [s for s in cfg.test_dataloader.dataset.pipeline if s.type == 'Resize']
    assert resize.scale == (1333, 800)

    heads = cfg.model.roi_head.bbox_head
    cascade = 'cascade' in path.stem
    assert isinstance(heads, list) == cascade
    for head in heads if cascade else [heads]:
        assert (head.num_shared_convs, head.num_shared_fcs, head.num_classes) == (4, 1, 80)
        assert head.norm_cfg.type == ('GN' if '_gn_' in path.stem else 'SyncBN')
        assert head.reg_decoded_bbox and not head.reg_class_agnostic
        assert head.loss_bbox == dict(type='GIoULoss', loss_weight=10.0)
    assert cfg.model.train_cfg.rpn_proposal.max_per_img == 2000


def test_stages_of_the_cascade():
    cfg = Config.fromfile(ROOT / 'configs/_base_/models/cascade-mask-rcnn_cae_vit-base.py')
    assert [head.bbox_coder.target_stds for head in cfg.model.roi_head.bbox_head] == [
        [0.1, 0.1, 0.2, 0.2],
        [0.05, 0.05, 0.1, 0.1],
        [0.033, 0.033, 0.067, 0.067],
    ]
    assert [stage.assigner.pos_iou_thr for stage in cfg.model.train_cfg.rcnn] == [0.5, 0.6, 0.7]
    assert cfg.model.roi_head.stage_loss_weights == [1, 0.5, 0.25]


@pytest.mark.parametrize('size', ['large', 'huge'])
def test_global_blocks_are_evenly_spaced(size):
    (path,) = [path for path in CONFIGS if f'{size}_dino' in path.stem]
    cfg = Config.fromfile(path)
    with torch.device('meta'):
        blocks = MODELS.build(cfg.model.backbone).blocks
    windows = [getattr(block.attn, 'window_size', None) for block in blocks]
    assert windows == ([14] * (len(blocks) // 4 - 1) + [None]) * 4
    assert cfg.model.backbone.with_cp


@pytest.mark.parametrize('name', ['mask-rcnn', 'dino'])
def test_learning_rates_decay_by_layer(name, coco, tmp_path):
    (path,) = [p for p in CONFIGS if f'large_{name}' in p.stem]
    runner = CAERunner.from_cfg(shrink(Config.fromfile(path), coco, tmp_path))
    wrapper = runner.build_optim_wrapper(runner.cfg.optim_wrapper)
    lr = {
        id(param): group['lr']
        for group in wrapper.optimizer.param_groups
        for param in group['params']
    }
    base = runner.cfg.optim_wrapper.optimizer.lr
    for key, param in runner.model.named_parameters():
        if key.startswith(('backbone.patch_embed', 'backbone.cls_token')):
            layers_above = 5
        elif key.startswith('backbone.blocks.'):
            layers_above = 4 - int(key.split('.')[2])
        else:  # pyramid and heads
            layers_above = 0
        assert lr[id(param)] == pytest.approx(base * 0.8**layers_above), key


def test_heads_run_in_float32(coco, tmp_path):
    """RoIAlign of mmcv has no bfloat16."""
    (path,) = [p for p in CONFIGS if 'base_mask-rcnn_16xb2' in p.stem]
    cfg = shrink(Config.fromfile(path), coco, tmp_path)
    cfg.optim_wrapper.dtype = 'bfloat16'  # on any machine
    runner = CAERunner.from_cfg(cfg)
    wrapper = runner.build_optim_wrapper(runner.cfg.optim_wrapper)
    seen = {}
    for name in ('backbone.blocks.0.mlp.fc1', 'neck.1.fpn_convs.0.conv', 'rpn_head.rpn_conv'):
        runner.model.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out.dtype})
        )
    batch = next(iter(runner.build_dataloader(runner.cfg.train_dataloader)))
    runner.model.train_step(batch, wrapper)
    assert list(seen.values()) == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_own_data_names_its_classes_once():
    (path,) = [path for path in CONFIGS if 'custom' in path.stem]
    cfg = Config.fromfile(path)
    heads = cfg.model.roi_head
    assert heads.bbox_head.num_classes == heads.mask_head.num_classes == 1
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.metainfo.classes == ('balloon',)
        assert loader.dataset.data_root == 'data/custom/'
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file
    assert cfg.test_evaluator.ann_file == 'data/custom/annotations/val.json'


@pytest.mark.parametrize(
    ('classes', 'message'),
    [
        (('car', 'balloon'), "custom.json has its categories in another order than .'car'"),
        (('balloon', 'kite'), r"custom.json has no category 'kite'\. Set metainfo.classes .*'car'"),
        (('baloon',), "custom.json has no category 'baloon'"),
    ],
)
def test_classes_that_are_not_those_of_the_file(tmp_path, classes, message):
    """Mmdetection would number them in the file's order, or find no image at all."""
    cfg = own_data(tmp_path, classes)
    with pytest.raises(ValueError, match=message):
        check_datasets(cfg)


def test_categories_that_the_config_lacks_are_left_out_and_named(tmp_path):
    assert check_datasets(own_data(tmp_path, ('balloon', 'car'))) == []
    cfg = own_data(tmp_path, ('car',))
    [warning] = check_datasets(cfg)
    text = "categories that the config lacks, their objects are left out: 'balloon'"
    assert f'{tmp_path}/custom.json has {text}' == warning


def own_data(folder, classes):
    """The config for own data, with this file of two categories and no image yet."""
    categories = [dict(id=4, name='balloon'), dict(id=2, name='car')]
    content = dict(images=[], annotations=[], categories=categories)
    (folder / 'custom.json').write_text(json.dumps(content))
    (path,) = [path for path in CONFIGS if 'custom' in path.stem]
    cfg = Config.fromfile(path)
    dataset = dict(data_root=str(folder), ann_file='custom.json', metainfo=dict(classes=classes))
    cfg.train_dataloader.dataset.update(dataset)
    cfg.val_dataloader = None
    return cfg
