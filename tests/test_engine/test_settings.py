"""What users change has one place, whatever a config's pipelines look like."""

import importlib.util
from pathlib import Path

import pytest
from mmengine.config import Config

from cae_mm.engine.cli import load_config
from cae_mm.engine.settings import apply_settings, class_name, find_transforms

ROOT = Path(__file__).parent.parent.parent / 'configs'
LEAVES = {
    'cae': 'pretrain/cae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py',
    'rgb': 'pretrain/cae-rgb_vit-base-p16_4xb128-amp-coslr-300e_custom.py',
    'demo': 'demo/cae_demo.py',
    'dvae': 'tokenizer/dvae_8xb64-amp-coslr-100e_in1k.py',
    'linear': 'linear/vit-base-p16_cae-pre_32xb512-linear-coslr-90e_in1k.py',
    'finetune': 'finetune/vit-base-p16_cae-pre_8xb128-coslr-100e_custom.py',
    'mini': 'imagenette/vit-mini-p16_cae-pre_1xb64-linear-coslr-6e_imagenette-128px.py',
    'upernet': 'upernet/cae_vit-base_upernet_8xb2-amp-160k_ade20k-512x512.py',
    'mask': 'mask_rcnn/cae_vit-base_mask-rcnn_gn_16xb2-amp-1x_custom.py',
}
FRONT = dict(type='mmpretrain.Grayscale')  # a step of one's own


def read(name, inserted=False):
    cfg = Config.fromfile(ROOT / LEAVES[name])
    if inserted:
        for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            if loader in cfg:
                cfg[loader].dataset.pipeline.insert(0, dict(FRONT))
    return cfg


def pipelines(cfg):
    """Options by transform, of training and of evaluation (where there is one)."""
    loaders = [cfg.train_dataloader, cfg.get('val_dataloader'), cfg.get('test_dataloader')]
    return [
        {class_name(step): step for step in loader.dataset.pipeline} for loader in loaders if loader
    ]


@pytest.mark.parametrize('inserted', [False, True])
@pytest.mark.parametrize(
    ('name', 'size', 'second'),
    [
        ('cae', 128, 64),
        ('cae', (96, 160), (48, 80)),
        ('rgb', 128, None),
        ('demo', 48, 48),  # patches of 8 pixels
    ],
)
def test_image_size_of_pretraining(name, size, second, inserted):
    cfg = read(name, inserted)
    apply_settings(cfg, img_size=size)
    crop = pipelines(cfg)[0]['TwoViewResizedCrop']
    assert (cfg.model.backbone.img_size, crop['size'], crop['second_size']) == (size, size, second)
    assert 'pretrain_img_size' not in cfg.model.backbone


@pytest.mark.parametrize('inserted', [False, True])
@pytest.mark.parametrize(
    ('name', 'size', 'edge', 'pretrained'),
    [('linear', 384, 439, 224), ('finetune', (96, 160), 183, 224), ('mini', 256, 256, 128)],
)
def test_image_size_of_classifiers(name, size, edge, pretrained, inserted):
    """The evaluation's short edge keeps its proportion; the encoder its pretraining's positions."""
    cfg = read(name, inserted)
    apply_settings(cfg, img_size=size)
    train, *evaluations = pipelines(cfg)
    assert train['RandomResizedCrop'].scale == size
    ratios = train['RandomResizedCrop'].get('aspect_ratio_range')  # as little stretched
    assert ratios == (pytest.approx((5 / 4, 20 / 9)) if size == (96, 160) else None)
    assert len(evaluations) == 2
    for steps in evaluations:
        assert (steps['ResizeEdge'].scale, steps['CenterCrop'].crop_size) == (edge, size)
    backbone = cfg.model.backbone
    assert (backbone.img_size, backbone.pretrain_img_size) == (size, pretrained)


@pytest.mark.parametrize('inserted', [False, True])
def test_image_size_of_tokenizer_and_segmentor(inserted):
    dvae, upernet = read('dvae', inserted), read('upernet', inserted)
    apply_settings(dvae, img_size=64)
    assert pipelines(dvae)[0]['RandomResizedCrop'].scale == 64
    apply_settings(upernet, img_size=256)
    model, (train, *evaluations) = upernet.model, pipelines(upernet)
    assert (model.backbone.img_size, model.backbone.pretrain_img_size) == (256, 224)
    sizes = model.data_preprocessor.size, model.data_preprocessor.test_cfg.size
    assert {*sizes, model.test_cfg.crop_size, train['RandomCrop'].crop_size} == {(256, 256)}
    assert model.test_cfg.stride == (170, 170)
    assert train['RandomResize'].scale == (1024, 256)
    assert [steps['Resize'].scale for steps in evaluations] == [(1024, 256)] * 2


@pytest.mark.parametrize('inserted', [False, True])
@pytest.mark.parametrize('name', LEAVES)
def test_data_batch_and_transforms(name, inserted):
    cfg = read(name, inserted)
    loading = {'upernet': 'LoadImageFromFile', 'mask': 'LoadImageFromFile'}.get(name, 'LoadImage')
    apply_settings(cfg, data_root='MY', batch_size=3, transforms={loading: dict(color=1)})
    assert cfg.train_dataloader.batch_size == 3
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if loader in cfg:
            assert cfg[loader].dataset.data_root == 'MY'
            steps = [s for s in cfg[loader].dataset.pipeline if class_name(s) == loading]
            assert [step.color for step in steps] == [1]
    if name == 'mask':
        assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file
        assert cfg.val_evaluator.ann_file == 'MY/annotations/val.json'


@pytest.mark.parametrize('inserted', [False, True])
@pytest.mark.parametrize(('name', 'labels'), [('cae', False), ('dvae', False), ('linear', True)])
def test_shards_replace_the_folder_of_training(name, labels, inserted):
    cfg = read(name, inserted)
    pipeline = [dict(step) for step in cfg.train_dataloader.dataset.pipeline]
    cfg.train_dataloader.dataset.skip_broken = inserted  # as the command line puts it there
    apply_settings(cfg, shards='SHARDS', data_root='MY', transforms=dict(LoadImage=dict(color=1)))
    pipeline[inserted]['color'] = 1
    loader = cfg.train_dataloader
    assert loader.dataset == dict(
        type='cae_mm.ShardDataset',
        data_root='SHARDS',
        with_label=labels,
        skip_broken=inserted,
        pipeline=pipeline,
    )
    assert loader.sampler == dict(type='cae_mm.ShardSampler')
    assert name != 'linear' or cfg.val_dataloader.dataset.data_root == 'MY'
    before = cfg.to_dict()
    apply_settings(cfg, shards='SHARDS')
    assert cfg.to_dict() == before


@pytest.mark.parametrize('inserted', [False, True])
def test_mask_ratio(inserted):
    cfg = read('cae', inserted)
    apply_settings(cfg, mask_ratio=0.4)
    assert pipelines(cfg)[0]['CAEMaskGenerator'].mask_ratio == 0.4


def test_transforms_and_datasets_inside_others():
    """In wrappers of datasets, and in choices whose branches are lists or single transforms."""
    leaf = dict(pipeline=[dict(type='mm.Choice', transforms=[[dict(type='A')], dict(type='A')])])
    other = dict(pipeline=[dict(type='Apply', transforms=dict(type='A'))])
    wrapped = dict(type='Concat', datasets=[leaf, dict(type='Repeat', times=2, dataset=other)])
    cfg = Config(dict(train_dataloader=dict(dataset=wrapped), train_pipeline=[dict(type='A')]))
    apply_settings(cfg, data_root='MY', transforms=dict(A=dict(x=1)))
    assert [step.x for step in find_transforms(cfg) if step.type == 'A'] == [1] * 4
    first, second = cfg.train_dataloader.dataset.datasets
    assert first.data_root == second.dataset.data_root == 'MY'
    assert 'data_root' not in second


@pytest.mark.parametrize(
    ('name', 'settings', 'message'),
    [
        ('cae', dict(image_size=1), "unknown setting 'settings.image_size': did you mean img_size"),
        ('cae', dict(colour=1), "unknown setting 'settings.colour': choose one of batch_size, cpu"),
        (
            'cae',
            dict(transforms=dict(TwoViewCrop={})),
            'has a transform TwoViewCrop: did you mean TwoViewResizedCrop',
        ),
        ('linear', dict(mask_ratio=0.4), 'no pipeline .* has a transform CAEMaskGenerator'),
        ('mask', dict(shards='S'), 'replaces a folder of images, not one with annotations/train'),
        ('mask', dict(img_size=512), r'detectors see many: set settings.transforms.Resize.scale'),
    ],
)
def test_what_nothing_takes_is_an_error(name, settings, message):
    with pytest.raises(ValueError, match=message):
        apply_settings(read(name), **settings)


def test_settings_in_a_config_and_in_its_base(tmp_path):
    """In code they edit `_base_`; as a dict they wait, and options of the command line join."""
    path = tmp_path / 'config.py'
    path.write_text(
        f"_base_ = '{ROOT / LEAVES['cae']}'\n"
        'from cae_mm.engine.settings import apply_settings\n'
        'apply_settings(_base_, img_size=128, cpu_batch_size=4)\n'
        'settings = dict(mask_ratio=0.25)\n'
    )
    cfg = load_config(path, {'settings.transforms.TwoViewResizedCrop.scale': (0.5, 1.0)})
    steps = pipelines(cfg)[0]
    assert steps['TwoViewResizedCrop'] | dict(scale=None) == dict(
        type='cae_mm.TwoViewResizedCrop', size=128, second_size=64, flip_prob=0.5, scale=None
    )
    assert steps['TwoViewResizedCrop'].scale == (0.5, 1.0)
    assert steps['CAEMaskGenerator'].mask_ratio == 0.25
    assert cfg.settings == dict(cpu_batch_size=4)  # the Runner's
    assert load_config(path, {'settings.batch_size': 16}).settings == dict(cpu_batch_size=None)


def test_options_that_nothing_looks_at_are_errors(tmp_path):
    with pytest.raises(ValueError, match='--cfg-options modell.type: .* did you mean model'):
        load_config(ROOT / LEAVES['cae'], {'modell.type': 'A'})
    with pytest.raises(FileNotFoundError, match=f'no config at {tmp_path / "none.py"}'):
        load_config(tmp_path / 'none.py')


@pytest.mark.parametrize(
    ('name', 'epochs', 'warmup'), [('linear', 30, 3), ('linear', 900, 100), ('finetune', 1, 0.5)]
)
def test_epochs_shorten_the_schedule_in_proportion(name, epochs, warmup):
    cfg = read(name, False)
    apply_settings(cfg, epochs=epochs)
    first, cosine = cfg.param_scheduler
    assert (cfg.train_cfg.max_epochs, first.end, cosine.begin) == (epochs, warmup, warmup)


def test_epochs_move_milestones_and_are_not_for_iterations():
    cfg = read('upernet', False)
    with pytest.raises(ValueError, match='counts updates, set train_cfg.max_iters'):
        apply_settings(cfg, epochs=3)
    cfg.train_cfg = dict(max_epochs=12)
    cfg.param_scheduler = [dict(type='MultiStepLR', by_epoch=True, milestones=[9, 11])]
    apply_settings(cfg, epochs=4)
    assert cfg.param_scheduler[0].milestones == [3, 4]
    cfg.param_scheduler = dict(type='CosineAnnealingLR', by_epoch=True, T_max=4)  # one alone
    apply_settings(cfg, epochs=8)
    assert cfg.param_scheduler.T_max == 8


@pytest.mark.parametrize('name', LEAVES)
def test_a_run_is_watched_beside_its_files(name, monkeypatch):
    """Without the packages installed; twice is once."""
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
    cfg = read(name)
    apply_settings(cfg, watch='tensorboard')
    apply_settings(cfg, watch=['tensorboard', 'mlflow'])
    types = [backend.type for backend in cfg.visualizer.vis_backends]
    assert types == ['LocalVisBackend', 'TensorboardVisBackend', 'MLflowVisBackend']


def test_watching_without_a_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match='settings.watch=wandb needs .*: pip install wandb'):
        apply_settings(read('cae'), watch='wandb')
    with pytest.raises(ValueError, match="watch knows no 'tensorbord': did you mean tensorboard"):
        apply_settings(read('cae'), watch=['tensorbord'])
    with pytest.raises(ValueError, match='settings.watch: this config has no visualizer'):
        apply_settings(Config(), watch='wandb')


def test_pictures_are_one_hook(monkeypatch):
    cfg = read('rgb')
    before = list(cfg.custom_hooks)
    apply_settings(cfg, pictures='MY')
    assert cfg.custom_hooks == [*before, dict(type='cae_mm.PictureHook', images=['MY'])]
    cfg.custom_hooks[-1].interval = 3
    monkeypatch.setenv('HOME', '/home/me')
    apply_settings(cfg, pictures=['~/a', 'b'])
    hook = dict(type='cae_mm.PictureHook', images=['/home/me/a', 'b'], interval=3)
    assert cfg.custom_hooks == [*before, hook]
