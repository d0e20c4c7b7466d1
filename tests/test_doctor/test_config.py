"""Each mistake that the linter knows, made in a config that is right otherwise."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import GRID, PATCH, VOCAB, build_cae, cae_config
from mmengine.config import Config, ConfigDict
from PIL import Image
from safetensors.torch import save_file

from cae_mm.doctor import case, weights
from cae_mm.doctor.case import Finding, Machine
from cae_mm.doctor.report import format_finding, lint, main
from cae_mm.doctor.training import named_batch

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / 'configs').glob('*/*.py') if path.parent.name != '_base_')
SIDE = GRID[0] * PATCH
GPU = Machine(processes=1, cuda=True)
IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Six images in two classes, for training and evaluation."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for i in range(6):
        path = folder / 'train' / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(20, 24, 3), dtype=np.uint8)).save(path)
    return folder


def loader(folder: Path, pipeline: list, **dataset) -> dict:
    return dict(
        batch_size=2,
        num_workers=0,
        drop_last=True,
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=dict(
            type='mmpretrain.CustomDataset',
            data_root=str(folder),
            data_prefix='train',
            pipeline=pipeline,
            **dataset,
        ),
    )


def training(**changes) -> dict:
    return dict(
        default_scope='mmpretrain',
        optim_wrapper=dict(
            type='cae_mm.BF16OptimWrapper',
            constructor='cae_mm.LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-3, fused=True),
        ),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1),
        auto_scale_lr=dict(base_batch_size=2),
        **changes,
    )


def text_of(cfg: dict) -> str:
    return '\n'.join(f'{key} = {value!r}' for key, value in cfg.items())


def save(path: Path, cfg: dict) -> Path:
    path.write_text(text_of(cfg))
    return path


def read(path: Path) -> ConfigDict:
    return Config.fromfile(path)._cfg_dict


@pytest.fixture
def pretraining(folder, tmp_path):
    pipeline = [
        dict(type='cae_mm.LoadImage'),
        dict(type='cae_mm.TwoViewResizedCrop', size=SIDE, second_size=8 * GRID[0]),
        dict(type='cae_mm.CAEMaskGenerator', patch_size=PATCH, min_block=2),
        dict(type='mmpretrain.PackInputs'),
    ]
    model = cae_config(
        data_preprocessor=dict(
            type='cae_mm.CAEDataPreprocessor', second_mean=[127.5] * 3, second_std=[127.5] * 3
        )
    )
    train = loader(folder, pipeline, with_label=False)
    return save(tmp_path / 'cae_1xb2.py', training(model=model, train_dataloader=train))


@pytest.fixture(scope='module')
def trained():
    """A model of that config."""
    return build_cae()


@pytest.fixture
def pretrained(pretraining, trained, tmp_path):
    """A checkpoint as mmengine's Runner writes it."""
    path = tmp_path / 'epoch_1.pth'
    meta = dict(cfg=pretraining.read_text())
    torch.save(dict(state_dict=trained.state_dict(), meta=meta), path)
    return path


@pytest.fixture
def classifier(folder, tmp_path, pretrained):
    backbone = dict(cae_config()['backbone'], out_type='cls_token', frozen_stages=2)
    backbone['init_cfg'] = dict(type='Pretrained', checkpoint=str(pretrained), prefix='backbone.')
    model = dict(
        type='mmpretrain.ImageClassifier',
        data_preprocessor=dict(type='mmpretrain.ClsDataPreprocessor', num_classes=2, **IMAGENET),
        backbone=backbone,
        head=dict(type='cae_mm.LinearProbeHead', num_classes=2, in_channels=16),
    )
    pipeline = [dict(type='cae_mm.LoadImage'), dict(type='mmpretrain.PackInputs')]
    loaders = {name: loader(folder, pipeline) for name in case.LOADERS}
    return save(tmp_path / 'probe_1xb2.py', training(model=model, **loaders))


def check(path: Path, machine: Machine = GPU, checkpoint: Path | None = None, **options):
    """Lint; options have two underscores for a dot."""
    dotted = {key.replace('__', '.'): value for key, value in options.items()}
    return lint(path, machine, dotted, checkpoint)


def only(findings: list[Finding], level: str, key: str) -> Finding:
    """The one finding there is."""
    assert [(f.level, f.key) for f in findings] == [(level, key)], findings
    return findings[0]


def test_right_configs_have_no_findings(pretraining, classifier, pretrained):
    assert check(pretraining) == []
    assert check(pretraining, checkpoint=pretrained) == []
    assert check(classifier) == []
    assert check(classifier, checkpoint=pretrained) == []


@pytest.mark.parametrize(
    ('options', 'level', 'key', 'text', 'remedy'),
    [
        # types and keys
        (
            dict(model__type='CAE'),
            'warning',
            'model.type',
            'mmpretrain.models.selfsup.cae.CAE, not that of cae_mm',
            "type='cae_mm.CAE'",
        ),
        (
            dict(model__neck__type='cae_mm.CAENek'),
            'error',
            'model.neck.type',
            'cae_mm has no CAENek',
            'choose CAENeck',
        ),
        (
            dict(model__backbone__type='CAEViT'),
            'error',
            'model.backbone.type',
            'the scope mmpretrain has no CAEViT',
            "type='cae_mm.CAEViT'",
        ),
        (
            dict(model__backbone__droppath_rate=0.1),
            'error',
            'model.backbone.droppath_rate',
            'CAEViT has no argument droppath_rate',
            'choose drop_path_rate',
        ),
        (
            dict(train_dataloader__dataset__pipeline__2__ratio=0.1),
            'error',
            'train_dataloader.dataset.pipeline.2.ratio',
            'CAEMaskGenerator has no argument ratio',
            'choose mask_ratio',
        ),
        (
            dict(custom_hooks=[dict(type='cae_mm.GumbelTemperatureHook', stop=1)]),
            'error',
            'custom_hooks.0.stop',
            'GumbelTemperatureHook has no argument stop',
            'choose',
        ),
        (
            dict(optim_wrapper__clip_gradient=dict(max_norm=1)),
            'error',
            'optim_wrapper.clip_gradient',
            "unexpected keyword argument 'clip_gradient'",
            '',
        ),
        # building
        (
            dict(train_dataloader__dataset__pipeline__2__mask_ratio=2.0),
            'error',
            'train_dataloader.dataset.pipeline.2.mask_ratio',
            'mask_ratio must be between 0 and 1, not 2',
            '',
        ),
        (
            dict(train_dataloader__dataset__pipeline__3__type='mmpretrain.PackInput'),
            'error',
            'train_dataloader.dataset.pipeline.3',
            'mmpretrain.PackInput is not in the mmpretrain::transform registry$',
            '',
        ),
        (
            dict(optim_wrapper__optimizer__betas=(0.9, 2)),
            'error',
            'optim_wrapper.optimizer',
            'Invalid beta parameter',
            '',
        ),
        (
            dict(optim_wrapper__paramwise_cfg=dict(layer_decay=0.9)),
            'error',
            'optim_wrapper',
            'knows paramwise_cfg.layer_decay_rate only',
            '',
        ),
        # views and masks
        (
            dict(train_dataloader__dataset__pipeline__1__size=32),
            'error',
            'train_dataloader.dataset.pipeline.1.size',
            'view 1 has 32x32 pixels, but model.backbone.img_size says 16x16',
            r'set size=\(16, 16\)',
        ),
        (
            dict(train_dataloader__dataset__pipeline__1__second_size=16),
            'error',
            'train_dataloader.dataset.pipeline.1.second_size',
            '4x4 patches need as many tokens, each of 8 pixels',
            r'set second_size=\(32, 32\)',
        ),
        (
            dict(train_dataloader__dataset__pipeline__2__patch_size=8),
            'error',
            'train_dataloader.dataset.pipeline.2.patch_size',
            'masks are made for patches of 8 pixels, the encoder has 4',
            'set patch_size=4',
        ),
        (
            dict(train_dataloader__dataset__pipeline__2__mask_ratio=0.05),
            'error',
            'train_dataloader.dataset.pipeline.2.mask_ratio',
            '0.05 hides none of 16 patches',
            'set it above 0.0625',
        ),
        (
            dict(train_dataloader__dataset__pipeline__2__min_block=16),
            'warning',
            'train_dataloader.dataset.pipeline.2.min_block',
            'blocks of 16 patches do not fit: 8 of 16 are masked',
            'set min_block=1',
        ),
        (
            dict(model__data_preprocessor__second_std=[318.75] * 3),
            'warning',
            'model.data_preprocessor.second_std',
            r'DiscreteVAE was trained on images in \[-1, 1\]',
            r'second_std=\(127.5, 127.5, 127.5\)',
        ),
        # options that pretraining cannot have
        (
            dict(model__backbone__use_rel_pos_bias=True),
            'error',
            'model.backbone.use_rel_pos_bias',
            'pretraining sees some patches only',
            'leave use_rel_pos_bias out',
        ),
        (
            dict(model__backbone__window_size=2),
            'error',
            'model.backbone.window_size',
            'pretraining sees some patches only',
            'leave window_size out',
        ),
        # learning rate
        (
            dict(train_dataloader__batch_size=4),
            'warning',
            'optim_wrapper.optimizer.lr',
            'lr=0.001 for a batch of 2, this run has lr=0.001 for 1 x 4 x 1 = 4 ',
            'lr=0.002, .*smaller train_dataloader.batch_size$',
        ),
        (
            dict(optim_wrapper__accumulative_counts=2),
            'warning',
            'optim_wrapper.optimizer.lr',
            '1 x 2 x 2 = 4 ',
            'lr=0.002,',
        ),
        (
            dict(optim_wrapper__optimizer__lr=5e-4),
            'warning',
            'optim_wrapper.optimizer.lr',
            'this run has lr=0.0005 for 1 x 2 x 1 = 2 ',
            'lr=0.001,',
        ),
        (
            dict(optim_wrapper__accumulative_counts=2, auto_scale_lr__enable=True),
            'warning',
            'optim_wrapper.optimizer.lr',
            r'auto_scale_lr makes it 0.001\) for 1 x 2 x 2 = 4',
            'lr=0.002,',
        ),
        (
            dict(
                optim_wrapper__accumulative_counts=2,
                optim_wrapper__optimizer__lr=2e-3,
                auto_scale_lr__enable=True,
            ),
            'note',
            'auto_scale_lr.enable',
            'does not count accumulation: base_batch_size is compared with 1 x 2$',
            'without accumulation',
        ),
    ],
)
def test_mistake_in_pretraining(pretraining, options, level, key, text, remedy):
    findings = [f for f in check(pretraining, **options) if 'cannot be built' not in f.text]
    if options.get('model__type') == 'CAE':  # and then nothing else fits
        findings = [f for f in findings if f.key == 'model.type']
    finding = only(findings, level, key)
    assert re.search(text, finding.text), finding.text
    assert re.search(remedy, finding.remedy), finding.remedy


def test_harmless_changes_of_pretraining(pretraining):
    for options in (
        dict(train_dataloader__batch_size=3),  # 1.5 times the recipe's
        dict(train_dataloader__batch_size=4, auto_scale_lr__enable=True),
        dict(train_dataloader__batch_size=1, optim_wrapper__accumulative_counts=2),
        dict(train_dataloader__batch_size=4, optim_wrapper__optimizer__lr=2e-3),
        dict(custom_imports=None, train_dataloader__num_workers=4, train_dataloader__pin_memory=1),
        dict(custom_hooks=[dict(type='EMAHook')]),
        dict(model__data_preprocessor__mean=[127.5] * 3),
        dict(
            train_dataloader__dataset__pipeline__2__strategy='random',
            model__head__type='cae_mm.CAEPretrainHead',
        ),
    ):
        assert check(pretraining, **options) == [], options


@pytest.mark.parametrize(
    ('neck', 'key', 'text'),
    [
        (dict(in_dims=8), 'model.neck.in_dims', 'neck.in_dims is 8, but must be 16'),
        (dict(out_dims=7), 'model.neck.out_dims', f'neck.out_dims is 7, but must be {VOCAB}'),
        (dict(embed_dims=12, num_heads=5), 'model.neck', 'CAENeck: a width of 12 cannot be split'),
    ],
)
def test_parts_that_do_not_fit(pretraining, neck, key, text):
    error, note = lint(pretraining, GPU, {f'model.neck.{k}': v for k, v in neck.items()})
    assert (error.level, error.key) == ('error', key)
    assert text in error.text
    assert note.text.startswith('it cannot be built: views, positions')


def test_value_is_shown(pretraining):
    [finding] = check(pretraining, model__backbone__window_size=2)
    assert finding.value == '2'
    lines = format_finding(finding).splitlines()
    assert lines[0] == 'error    model.backbone.window_size = 2'
    assert lines[-1] == '         -> leave window_size out; fine-tuning may have it'


def test_pipeline_of_pretraining(pretraining):
    load, crop, mask, pack = read(pretraining).train_dataloader.dataset.pipeline
    key = 'train_dataloader__dataset__pipeline'
    dotted = key.replace('__', '.')
    finding = only(check(pretraining, **{key: [load, crop, pack]}), 'error', dotted)
    assert finding.text == 'nothing makes masks'
    finding = only(check(pretraining, **{key: [load, mask, crop, pack]}), 'error', f'{dotted}.1')
    assert 'before it is cropped' in finding.text
    own = dict(type='mmpretrain.BEiTMaskGenerator', input_size=4, num_masking_patches=8)
    assert check(pretraining, **{key: [load, crop, own, pack]}) == []


def test_pixel_targets_need_no_second_view(pretraining):
    rgb = dict(
        model__target_generator=dict(_delete_=True, type='cae_mm.RGBTarget'),
        model__neck__out_dims=3 * PATCH**2,
    )
    key = 'train_dataloader.dataset.pipeline.1.second_size'
    finding = only(check(pretraining, **rgb), 'note', key)
    assert finding.remedy == 'set second_size=None'
    rgb['train_dataloader__dataset__pipeline__1__second_size'] = None
    assert check(pretraining, **rgb) == []


def test_dalle_wants_its_own_range(pretraining):
    dalle = dict(
        model__target_generator=dict(
            _delete_=True, type='cae_mm.DALLEEncoder', n_hid=8, vocab_size=VOCAB
        )
    )
    mean, std = check(pretraining, **dalle)
    assert mean.key == 'model.data_preprocessor.second_mean'
    assert std.remedy == 'set model.data_preprocessor.second_std=(318.75, 318.75, 318.75)'
    dalle |= dict(
        model__data_preprocessor__second_mean=[-31.875] * 3,
        model__data_preprocessor__second_std=[318.75] * 3,
    )
    assert check(pretraining, **dalle) == []


def test_learning_rate_with_more_processes(pretraining):
    findings = check(pretraining, Machine(8, True), train_dataloader__drop_last=False)
    finding = only(findings, 'warning', 'optim_wrapper.optimizer.lr')
    assert 'for 8 x 2 x 1 = 16' in finding.text
    assert 'lr=0.008' in finding.remedy


@pytest.mark.parametrize(
    ('name', 'base', 'accumulation', 'recipe'),
    [
        ('cae_8xb16-accum4', 128, 4, 512),  # mmengine's way, without accumulation
        ('cae_8xb16-accum4', 512, 4, 512),
        ('cae_8xb16', None, 1, 128),
        ('mine', 128, 4, 512),  # nearer to what runs, 8 x 16 x 4
        ('mine', 512, 4, 512),
    ],
)
def test_batch_of_the_recipe(pretraining, tmp_path, name, base, accumulation, recipe):
    cfg = read(pretraining)
    cfg.optim_wrapper.accumulative_counts = accumulation
    cfg.train_dataloader.update(batch_size=16, drop_last=False)
    cfg.auto_scale_lr = base and dict(base_batch_size=base)
    path = save(tmp_path / f'{name}.py', cfg)
    assert check(path, Machine(8, True)) == []
    finding = only(check(path, Machine(4, True)), 'warning', 'optim_wrapper.optimizer.lr')
    if name != 'mine':
        assert f'for a batch of {recipe}' in finding.text
    assert named_batch(name) == (None if name == 'mine' else (8, 16))


def test_no_recipe_to_compare_with(pretraining, tmp_path):
    cfg = read(pretraining)
    cfg.auto_scale_lr = None
    finding = only(check(save(tmp_path / 'mine.py', cfg)), 'note', 'auto_scale_lr')
    assert finding.text == 'nothing says which batch lr=0.001 is for'


def test_precision(pretraining):
    amp = dict(optim_wrapper__type='AmpOptimWrapper')
    cpu, old = Machine(), Machine(cuda=True, bf16=False)
    finding = only(check(pretraining, cpu, **amp), 'error', 'optim_wrapper.type')
    assert "set optim_wrapper.type='cae_mm.BF16OptimWrapper'" in finding.remedy
    finding = only(check(pretraining, old), 'warning', 'optim_wrapper.type')
    assert finding.remedy.endswith("optim_wrapper.dtype='float16'")
    only(
        check(pretraining, old, **amp, optim_wrapper__dtype='bfloat16'),
        'warning',
        'optim_wrapper.type',
    )
    assert check(pretraining, old, **amp) == check(pretraining, cpu) == []


def test_sync_bn(classifier):
    neck = dict(type='cae_mm.ViTFeaturePyramid', in_channels=16, patch_size=PATCH, strides=(1,))
    options = dict(model__neck=neck, auto_scale_lr__enable=True)
    finding = only(check(classifier, **options), 'note', 'model')
    assert finding.text.startswith('SyncBN (neck.levels.0.1) becomes plain BN on one process')
    finding = only(check(classifier, Machine(2), **options), 'error', 'model')
    assert 'works on GPUs only, not on 2 CPU processes' in finding.text
    assert check(classifier, Machine(2, True), **options) == []


@pytest.mark.parametrize(
    ('options', 'level', 'key', 'remedy'),
    [
        (dict(model__backbone__frozen_stages=1), 'error', 'frozen_stages', 'frozen_stages=2'),
        (dict(model__backbone__frozen_stages=-1), 'error', 'frozen_stages', 'frozen_stages=2'),
        (dict(model__backbone__drop_path_rate=0.1), 'warning', 'drop_path_rate', 'leave'),
        (dict(model__backbone__out_type='raw'), 'error', 'out_type', "out_type='cls_token'"),
        (
            dict(model__head__type='cae_mm.AttentiveProbeHead', model__head__num_heads=2),
            'error',
            'out_type',
            "out_type='raw'",
        ),
    ],
)
def test_mistake_in_a_probe(classifier, options, level, key, remedy):
    finding = only(check(classifier, **options), level, f'model.backbone.{key}')
    assert remedy in finding.remedy


def test_fine_tuning_is_no_probe(classifier):
    options = dict(
        model__backbone__frozen_stages=-1,
        model__backbone__drop_path_rate=0.1,
        model__backbone__use_rel_pos_bias=True,
        model__backbone__out_type='avg_featmap',
        model__head__type='mmpretrain.LinearClsHead',
    )
    assert check(classifier, **options) == []


def test_misspelt_key_of_a_class_with_options(classifier):
    error, note = check(classifier, model__head__top_k=(1,))
    assert (error.key, note.level) == ('model.head.top_k', 'note')
    assert "unexpected keyword argument 'top_k'" in error.text


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        (dict(mean=[127.5] * 3, std=[127.5] * 3), r'mean=\[127.5, 127.5, 127.5\]'),
        (dict(to_rgb=False), '57.375], BGR; '),
        (dict(mean=None, std=None), r'mean=\[0, 0, 0\], std=\[1, 1, 1\]'),
    ],
)
def test_normalization_other_than_in_pretraining(classifier, pretrained, change, text):
    options = {f'model__data_preprocessor__{key}': value for key, value in change.items()}
    finding = only(check(classifier, **options), 'warning', 'model.data_preprocessor')
    assert text.replace('\\', '') in finding.text
    assert 'epoch_1.pth was made with mean=[123.675, 116.28, 103.53]' in finding.text
    content = torch.load(pretrained, weights_only=True)
    torch.save(content['state_dict'], pretrained)  # nothing says how it was made
    options['model__backbone__pretrain_img_size'] = SIDE
    finding = only(check(classifier, **options), 'warning', 'model.data_preprocessor')
    assert 'pretraining has by default (ImageNet) mean=[123.675' in finding.text


def test_normalization_of_own_pretraining(classifier, pretraining, pretrained):
    cfg = read(pretraining)
    cfg.model.data_preprocessor.mean = [1.0, 2.0, 3.0]
    content = torch.load(pretrained, weights_only=True)
    content['meta']['cfg'] = text_of(cfg)
    torch.save(content, pretrained)
    finding = only(check(classifier), 'warning', 'model.data_preprocessor')
    assert 'epoch_1.pth was made with mean=[1, 2, 3]' in finding.text
    assert check(classifier, model__data_preprocessor__mean=[1.0, 2.0, 3.0]) == []
    # pretraining that goes on from it
    options = dict(
        model__backbone__init_cfg=dict(
            type='Pretrained', checkpoint=str(pretrained), prefix='backbone.'
        )
    )
    only(check(pretraining, **options), 'warning', 'model.data_preprocessor')


def test_normalization_at_the_top_of_the_config(classifier, tmp_path):
    cfg = read(classifier)
    cfg.data_preprocessor = cfg.model.pop('data_preprocessor')
    assert check(save(tmp_path / 'top_1xb2.py', cfg)) == []
    cfg.data_preprocessor.to_rgb = False
    only(check(save(tmp_path / 'top_1xb2.py', cfg)), 'warning', 'data_preprocessor')


def test_positions_of_another_size(classifier, pretrained):
    finding = only(
        check(classifier, model__backbone__img_size=32), 'error', 'model.backbone.img_size'
    )
    assert 'epoch_1.pth was pretrained at 16x16 pixels' in finding.text
    assert finding.remedy == 'set model.backbone.pretrain_img_size=(16, 16)'
    named = dict(model__backbone__img_size=32, model__backbone__pretrain_img_size=16)
    assert check(classifier, **named) == []
    named['model__backbone__pretrain_img_size'] = 24
    only(check(classifier, **named), 'error', 'model.backbone.pretrain_img_size')
    torch.save(torch.load(pretrained, weights_only=True)['state_dict'], pretrained)
    finding = only(check(classifier), 'note', 'model.backbone.img_size')
    assert 'does not say its size of pretraining' in finding.text
    assert check(classifier, model__backbone__pretrain_img_size=16) == []


def test_metadata_of_converted_weights(classifier, trained, tmp_path):
    path = tmp_path / 'converted.safetensors'
    encoder = trained.backbone.state_dict()
    metadata = '{"encoder": {"num_heads": 4, "pretrain_img_size": [24, 24]}}'
    save_file(encoder, path, metadata=dict(cae_mm=metadata))
    init = dict(_delete_=True, type='Pretrained', checkpoint=str(path))
    heads, positions = check(classifier, model__backbone__init_cfg=init)
    assert 'it was made with 4 heads, the model has 2' in heads.text
    assert positions.remedy == 'set model.backbone.pretrain_img_size=(24, 24)'


def test_heads_of_the_config_in_a_checkpoint(classifier):
    arch = dict(embed_dims=16, depth=2, num_heads=4, layer_scale=0.1)
    key = 'model.backbone.init_cfg.checkpoint'
    finding = only(check(classifier, model__backbone__arch=arch), 'error', key)
    assert finding.remedy == 'set num_heads=2 in model.backbone.arch (a dict)'


def test_missing_files(classifier, tmp_path):
    options = dict(model__backbone__init_cfg__checkpoint='absent.pth')
    finding = only(check(classifier, **options), 'error', 'model.backbone.init_cfg.checkpoint')
    assert finding.text == f'{Path("absent.pth").absolute()} does not exist'
    assert finding.value == "'absent.pth'"
    finding = only(check(classifier, load_from='absent.pth'), 'error', 'load_from')
    finding = only(check(classifier, checkpoint=tmp_path / 'absent.pth'), 'error', 'CHECKPOINT')
    assert finding.value == str(tmp_path / 'absent.pth')
    options['model__backbone__init_cfg__checkpoint'] = 'https://example.org/cae.pth'
    finding = only(check(classifier, **options), 'error', 'model.backbone.init_cfg.checkpoint')
    assert finding.remedy == 'download it first'


def test_missing_tokenizer(pretraining):
    init = dict(type='Pretrained', checkpoint='absent.pth')
    findings = check(pretraining, model__target_generator__init_cfg=init)
    finding = only(findings, 'error', 'model.target_generator.init_cfg.checkpoint')
    assert 'train an own tokenizer' in finding.remedy


def test_file_of_something_else(classifier, tmp_path):
    path = tmp_path / 'dvae.pth'
    meta = dict(
        cfg="model = dict(type='cae_mm.DiscreteVAE', data_preprocessor=dict(mean=[0, 0, 0]))"
    )
    torch.save(dict(state_dict=dict(weight=torch.zeros(1)), meta=meta), path)
    finding = only(check(classifier, checkpoint=path), 'error', 'CHECKPOINT')
    assert finding.remedy.startswith('give weights of CAEViT')


class Malice:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def test_nothing_in_a_checkpoint_is_executed(classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict={}, meta=Malice()), 'evil.pth')
    finding = only(check(classifier, checkpoint=Path('evil.pth')), 'error', 'CHECKPOINT')
    assert 'nothing in it was executed' in finding.text
    assert not Path('executed').exists()


def test_config_text_is_not_executed(tmp_path):
    text = '\n'.join(
        (
            'import os',
            f"os.mkdir('{tmp_path}/executed')",
            f"made = os.mkdir('{tmp_path}/executed')",
            "model = dict(type='cae_mm.CAE', backbone=dict(img_size=(224, 192), far=-1e-05))",
            "hooks = [dict(type='A', **{'b': 1}), {'x y': inf}]",
        )
    )
    assert weights.parse_config(text) == dict(
        made=f"os.mkdir('{tmp_path}/executed')",
        model=dict(type='cae_mm.CAE', backbone=dict(img_size=(224, 192), far=-1e-5)),
        hooks=[dict(type='A'), {'x y': 'inf'}],
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('path', CONFIGS[::20], ids=lambda path: path.stem)
def test_config_text_of_the_runner_is_read(path):
    cfg = Config.fromfile(path)
    assert weights.parse_config(cfg.pretty_text) == cfg.to_dict()


@pytest.mark.parametrize('text', ['def', '(' * 5000, 'x = ' + '-' * 100_000 + '1', 7])
def test_broken_config_text_counts_as_none(classifier, pretrained, text):
    content = torch.load(pretrained, weights_only=True)
    content['meta']['cfg'] = text
    torch.save(content, pretrained)
    only(check(classifier), 'note', 'model.backbone.img_size')  # it does not say its size


@pytest.mark.parametrize(
    ('prefix', 'text', 'remedy'),
    [
        (
            '',
            "The file has these keys under prefix='backbone.'",
            'and init_cfg.prefix as their keys begin',
        ),
        (
            'encoder.',
            "The file has these keys under prefix='backbone.'",
            'and init_cfg.prefix as their keys begin',
        ),
    ],
)
def test_wrong_prefix(classifier, prefix, text, remedy):
    key = 'model.backbone.init_cfg'
    findings = lint(classifier, GPU, {f'{key}.prefix': prefix})
    finding = only(findings, 'error', f'{key}.checkpoint')
    assert text in finding.text and remedy in finding.remedy


def test_wrong_arch(classifier):
    findings = check(classifier, model__backbone__arch='tiny', model__backbone__frozen_stages=12)
    finding = next(f for f in findings if 'does not fit CAEViT' in f.text)
    assert 'The file has width 16, the model 192' in finding.text
    assert 'an encoder with arch=dict(embed_dims=16, depth=2, ...), patch_size=4' in finding.remedy


def test_arch_of_a_file_by_name():
    state = {
        'cls_token': torch.zeros(1, 1, 1024),
        'patch_embed.proj.weight': torch.zeros(1, 3, 16, 16),
    }
    state |= {f'blocks.{i}.gamma_1': torch.zeros(1) for i in range(24)}
    assert weights._describe(state) == "arch='large', patch_size=16"


def test_encoder_alone_for_a_whole_model(pretraining, trained, tmp_path):
    path = tmp_path / 'encoder.pth'
    torch.save(trained.backbone.state_dict(), path)
    for options in (dict(load_from=str(path)), dict(load_from=str(path), resume=True)):
        finding = only(check(pretraining, **options), 'error', 'load_from')
        assert finding.remedy.startswith('it is an encoder alone: leave out load_from')
    only(check(pretraining, checkpoint=path), 'error', 'CHECKPOINT')
    init = dict(type='Pretrained', checkpoint=str(path))
    assert check(pretraining, model__backbone__init_cfg=init) == []


def test_pretraining_file_for_a_whole_classifier(classifier, pretrained):
    options = dict(model__backbone__init_cfg=None)
    finding = only(check(classifier, load_from=str(pretrained), **options), 'note', 'load_from')
    assert finding.remedy.startswith('only its encoder fits: leave out load_from and set')
    finding = only(check(classifier, checkpoint=pretrained, **options), 'error', 'CHECKPOINT')
    assert "prefix='backbone.')" in finding.remedy


def test_whole_classifier_to_be_tested(classifier, tmp_path):
    from mmengine.registry import MODELS

    cfg = read(classifier)
    path = tmp_path / 'best.pth'
    state = MODELS.build(cfg.model).state_dict()
    meta = dict(cfg=text_of(cfg))
    torch.save(dict(state_dict=state, meta=meta), path)
    absent = dict(model__backbone__init_cfg__checkpoint='absent.pth')
    assert check(classifier, checkpoint=path, **absent) == []  # that is not needed then
    findings = check(classifier, checkpoint=path, model__head__num_classes=3)
    assert 'head.fc.weight is (2, 16) in the file' in only(findings, 'error', 'CHECKPOINT').text


@pytest.mark.parametrize(('gamma', 'level'), [(1e-3, 'warning'), (2.0, 'note'), (0.3, None)])
def test_layer_scale(pretraining, pretrained, gamma, level):
    content = torch.load(pretrained, weights_only=True)
    content['state_dict']['backbone.blocks.0.gamma_1'].fill_(-gamma)
    torch.save(content, pretrained)
    findings = check(pretraining, checkpoint=pretrained)
    if level is None:
        assert findings == []
    else:
        finding = only(findings, level, 'CHECKPOINT')
        assert f'layer scale is {gamma:.2g} on average' in finding.text


def test_layer_scale_of_the_arch_does_not_matter_downstream(classifier, pretrained):
    content = torch.load(pretrained, weights_only=True)
    content['state_dict']['backbone.blocks.0.gamma_1'].fill_(1e-4)
    torch.save(content, pretrained)
    assert check(classifier) == []


def test_missing_data(classifier, folder):
    root = 'train_dataloader__dataset__data_root'
    finding = only(check(classifier, **{root: '/absent'}), 'error', root.replace('__', '.'))
    assert finding.text == '/absent does not exist'
    for name, value in (('data_prefix', 'absent'), ('ann_file', 'absent.txt')):
        key = f'val_dataloader.dataset.{name}'
        finding = only(lint(classifier, GPU, {key: value}), 'error', key)
        assert finding.text == f'{folder / value} does not exist'
    test = dict(test_dataloader__dataset__data_root='/absent')  # training does without
    only(check(classifier, **test), 'warning', 'test_dataloader.dataset.data_root')
    assert check(classifier, **{root: 's3://bucket'}) == []  # not on this machine


def test_missing_data_in_wrappers(classifier):
    plain = read(classifier).train_dataloader.dataset
    absent = dict(plain, data_root='/absent')
    both = dict(_delete_=True, type='ConcatDataset', datasets=[plain, absent])
    wrapped = dict(type='RepeatDataset', times=2, dataset=both, _delete_=True)
    for dataset, key in ((both, 'dataset'), (wrapped, 'dataset.dataset')):
        findings = check(classifier, train_dataloader__dataset=dataset)
        only(findings, 'error', f'train_dataloader.{key}.datasets.1.data_root')


def test_unknown_dataset(classifier):
    options = dict(train_dataloader__dataset__type='mmpretrain.CustomDatset')
    finding = only(check(classifier, **options), 'error', 'train_dataloader.dataset')
    assert 'mmpretrain.CustomDatset is not in the' in finding.text


def test_too_few_images(classifier, folder):
    scaled = dict(auto_scale_lr__enable=True)
    assert check(classifier, **scaled, train_dataloader__batch_size=6) == []
    findings = check(classifier, **scaled, train_dataloader__batch_size=7)
    finding = only(findings, 'error', 'train_dataloader.batch_size')
    assert finding.text.startswith('6 images are 6 a process, less than a batch')
    assert 'batch_size=6 or less' in finding.remedy
    findings = check(classifier, Machine(3, True), **scaled, train_dataloader__batch_size=4)
    assert '6 images are 2 a process' in only(findings, 'error', 'train_dataloader.batch_size').text
    for change in (
        dict(train_dataloader__drop_last=False),
        dict(train_dataloader__sampler=dict(type='InfiniteSampler')),
    ):
        assert check(classifier, **scaled, train_dataloader__batch_size=7, **change) == []


def test_folder_without_images(classifier, tmp_path):
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    options = dict(train_dataloader__dataset__data_root=str(tmp_path))
    finding = only(check(classifier, **options), 'error', 'train_dataloader.dataset')
    assert finding.remedy.startswith('look at what is in the folder')


def test_package_that_cannot_be_imported(classifier, monkeypatch):
    def import_module(name: str) -> None:
        raise ImportError(f'no {name}')

    monkeypatch.setattr(case, 'import_module', import_module)
    head = dict(_delete_=True, type='mmseg.UPerHead')
    finding = only(check(classifier, model__decode_head=head), 'note', 'model')
    assert finding.text.endswith('since mmseg cannot be imported here: no mmseg.models')


def test_config_that_cannot_be_read(tmp_path):
    path = tmp_path / 'broken.py'
    assert only(lint(path, GPU), 'error', 'CONFIG').text == f'{path} does not exist'
    path.write_text("_base_ = './absent.py'")
    assert 'cannot be read: ' in only(lint(path, GPU), 'error', 'CONFIG').text
    path.write_text('model = dict(')
    assert 'cannot be read: ' in only(lint(path, GPU), 'error', 'CONFIG').text


def test_report(pretraining, capsys):
    assert main(pretraining, None, 1, []) == 0
    out = capsys.readouterr().out
    assert out == f'{pretraining} on 1 GPU\n0 errors, 0 warnings, 0 notes\n'
    assert main(pretraining, None, 2, ['auto_scale_lr.enable=True', 'model.backbone.x=1']) == 1
    out = capsys.readouterr().out
    assert f'{pretraining} on 2 GPUs\nerror    model.backbone.x = 1\n' in out
    assert out.endswith('\n1 error, 0 warnings, 1 note\n')


def test_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    assert Machine.detect() == Machine.detect(0) == Machine(1, False, True)
    assert Machine.detect(8) == Machine(8, True, True)  # not seen here
    monkeypatch.setenv('WORLD_SIZE', '4')
    assert Machine.detect() == Machine(4, False, True)
    assert str(Machine(4)) == '4 CPU processes' and str(Machine(1, True)) == '1 GPU'
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda i: (8 - i, 0))
    assert Machine.detect() == Machine(4, True, False)
    monkeypatch.delenv('WORLD_SIZE')
    assert Machine.detect() == Machine(2, True, False)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_own_config_has_no_findings_on_its_machine(path):
    processes, _ = named_batch(path.stem) or (1, None)
    findings = lint(path, Machine(processes, cuda=True))
    assert not [f for f in findings if f.level != 'note' and not is_missing_file(f)]


def is_missing_file(finding: Finding) -> bool:
    """Data and weights are not part of a checkout."""
    return finding.text.endswith('does not exist')
