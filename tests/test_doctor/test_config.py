"""Each mistake that the doctor knows, made in a config that is right otherwise."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import GRID, PATCH, VOCAB, build_cae, cae_config, loader_config, run_tool
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from PIL import Image

from cae_mm.checkpoints.files import write_safetensors
from cae_mm.doctor import case, report, training, trial
from cae_mm.doctor.case import Machine
from cae_mm.doctor.finding import Finding
from cae_mm.doctor.report import diagnose, main
from cae_mm.engine.settings import LOADERS
from cae_mm.models import describe_model
from cae_mm.precision import Precision

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / 'configs').glob('*/*.py') if path.parent.name != '_base_')
FAMILIES = list({path.parent.name: path for path in CONFIGS}.values())
SIDE = GRID[0] * PATCH
GPU = Machine(1, 'cuda')
IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
PIPELINE = 'train_dataloader.dataset.pipeline'
INIT = 'model.backbone.init_cfg.checkpoint'
COLLATE = 'train_dataloader.collate_fn'
VIEWS = 'model.data_preprocessor'
ADAM = 'optim_wrapper.optimizer'
LR = f'{ADAM}.lr'
GATHERED = 'optim_wrapper.accumulative_counts'
FITTED = {'runner_type': 'cae_mm.CAERunner', 'auto_scale_lr.enable': True}
HOOK = dict(type='cae_mm.GumbelTemperatureHook')


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


def save(path: Path, cfg: dict) -> Path:
    common = dict(
        default_scope='mmpretrain',
        optim_wrapper=dict(
            type='cae_mm.MixedPrecisionOptimWrapper',
            constructor='cae_mm.LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-3, fused=True),
        ),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1),
        auto_scale_lr=dict(base_batch_size=2),
    )
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in (common | cfg).items()))
    return path


@pytest.fixture
def pretraining(folder, tmp_path):
    model = cae_config(
        data_preprocessor=dict(
            type='cae_mm.CAEDataPreprocessor', second_mean=[127.5] * 3, second_std=[127.5] * 3
        )
    )
    train = loader_config(folder, data_prefix='train')
    return save(tmp_path / 'cae.py', dict(model=model, train_dataloader=train))


@pytest.fixture(scope='module')
def trained():
    """A model of that config."""
    return build_cae()


@pytest.fixture
def pretrained(trained, tmp_path):
    """A checkpoint as the Runner writes it."""
    return write(tmp_path / 'epoch_1.pth', trained)


def write(path: Path, model: torch.nn.Module, described: bool = True, **changes) -> Path:
    description = replace(describe_model(model), **changes).to_dict()
    meta = dict(cae_mm=dict(encoder=description)) if described else {}
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
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
    pipeline = [
        dict(type='cae_mm.LoadImage'),
        dict(type='mmpretrain.Resize', scale=SIDE),
        dict(type='mmpretrain.PackInputs'),
    ]
    dataset = dict(data_prefix='train', with_label=True, pipeline=pipeline)
    loaders = {name: loader_config(folder, **dataset) for name in LOADERS}
    return save(tmp_path / 'probe.py', dict(model=model, **loaders))


def check(path: Path, options: dict | None = None, machine=GPU, checkpoint=None):
    return diagnose(path, machine, options, checkpoint)


def expect(findings: list[Finding], level: str, key: str, *words: str) -> None:
    """There is one finding, besides the note that nothing can be built, and it has these words."""
    [finding] = [f for f in findings if 'cannot be built' not in f.text]
    assert (finding.level, finding.key) == (level, key), finding
    for word in words:
        assert word in f'{finding.text} -> {finding.remedy}', finding


def test_right_configs_have_no_findings(pretraining, classifier, pretrained):
    assert check(pretraining) == check(pretraining, checkpoint=pretrained) == []
    assert check(classifier) == check(classifier, checkpoint=pretrained) == []


@pytest.mark.parametrize(
    ('level', 'key', 'value', 'words'),
    [
        # types and arguments
        ('error', 'model.neck.type', 'cae_mm.CAENek', 'did you mean CAENeck?'),
        ('error', 'model.backbone.type', 'CAEViT', "mmpretrain has no CAEViT|'cae_mm.CAEViT'"),
        ('error', 'model.backbone.droppath_rate', 0.1, 'did you mean drop_path_rate?'),
        ('error', f'{PIPELINE}.2.ratio', 0.1, 'did you mean mask_ratio?'),
        # what cannot be built
        ('error', 'optim_wrapper.clip_gradient', {}, "keyword argument 'clip_gradient'"),
        ('error', 'optim_wrapper.paramwise_cfg', dict(layer_decay=1), 'layer_decay_rate only'),
        ('error', f'{PIPELINE}.2.mask_ratio', 2.0, 'between 0 and 1, not 2'),
        ('error', 'model.neck.in_dims', 8, 'is 8, but must be 16'),
        ('error', 'model.neck.out_dims', 7, f'must be {VOCAB}'),
        # what one batch tells
        ('error', 'model.backbone.img_size', 32, '16x16 pixels|img_size is 32x32'),
        ('error', f'{PIPELINE}.1.second_size', 16, '4x4 patches|second_size=(32, 32)'),
        ('error', f'{PIPELINE}.2.patch_size', 8, '4 entries|4x4 patches|patch_size=4'),
        ('error', f'{PIPELINE}.2.mask_ratio', 0.05, 'mask_ratio=0.05 hides no patch|4x4'),
        ('error', 'model.backbone.use_rel_pos_bias', True, 'leave out use_rel_pos_bias'),
        ('error', 'model.backbone.window_size', 2, 'leave out'),
        # what fails silently
        ('warning', f'{PIPELINE}.2.min_block', 16, '8 of 16|min_block=1'),
        (
            'warning',
            f'{VIEWS}.second_std',
            [318.75] * 3,
            'DiscreteVAE|[-1, 1]|(127.5, 127.5, 127.5)',
        ),
        ('warning', LR, 5e-4, 'it is 0.0005|makes 0.001'),
        ('warning', 'optim_wrapper.dtype', 'bfloat16', "none here|'auto'"),
    ],
)
def test_mistake(pretraining, monkeypatch, level, key, value, words):
    choice = Precision(torch.float32, 'none here')
    monkeypatch.setattr(training, 'choose_precision', lambda device: choice)
    expect(check(pretraining, {key: value}, Machine()), level, key, *words.split('|'))


@pytest.mark.parametrize(
    ('options', 'level', 'key', 'words'),
    [
        (
            {'custom_hooks': [HOOK | dict(stop=1)]},
            'error',
            'custom_hooks.0.stop',
            'no argument stop',
        ),
        ({f'{PIPELINE}.3.type': 'mmpretrain.PackInput'}, 'error', f'{PIPELINE}.3', 'is not in the'),
        ({f'{ADAM}.betas': (0.9, 2)}, 'error', ADAM, 'Invalid beta'),
        ({'model.neck.embed_dims': 12, 'model.neck.num_heads': 5}, 'error', 'model.neck', 'of 12'),
        ({f'{PIPELINE}.1.size': 32}, 'error', 'model.backbone.img_size', '32x32|img_size is 16x16'),
        ({f'{COLLATE}.type': 'pseudo_collate'}, 'error', COLLATE, 'default_collate'),
        ({'optim_wrapper.type': 'AmpOptimWrapper'}, 'error', 'optim_wrapper', 'only available'),
        ({'train_dataloader.batch_size': 4}, 'warning', LR, 'batch of 4 = 1 x 4 x 1|0.002'),
        ({GATHERED: 2}, 'warning', LR, '4 = 1 x 2 x 2|makes 0.002'),
        (FITTED | {LR: 5e-4}, 'warning', LR, 'makes 0.001'),
        # mmengine's own scaling does not count what is gathered
        (
            {GATHERED: 2, 'auto_scale_lr.enable': True},
            'warning',
            LR,
            '0.001 for a batch of 4|0.002',
        ),
    ],
)
def test_mistake_elsewhere(pretraining, options, level, key, words):
    expect(check(pretraining, options, Machine()), level, key, *words.split('|'))


def test_name_without_scope(pretraining):
    findings = check(pretraining, {'model.type': 'CAE'})  # then nothing else fits
    expect(
        [f for f in findings if f.key == 'model.type'],
        'warning',
        'model.type',
        'mmpretrain.models.selfsup.cae.CAE, not that of cae_mm',
        "type='cae_mm.CAE'",
    )


@pytest.mark.parametrize(
    'options',
    [
        {'train_dataloader.batch_size': 3},  # 1.5 times the recipe's
        {'train_dataloader.batch_size': 4, 'auto_scale_lr.enable': True},
        {'train_dataloader.batch_size': 1, GATHERED: 2},
        {'train_dataloader.batch_size': 4, LR: 2e-3},
        {'custom_imports': None, 'train_dataloader.num_workers': 4},
        {'custom_hooks': [dict(type='EMAHook')]},
        {'model.data_preprocessor.mean': [127.5] * 3},
        {f'{PIPELINE}.2.strategy': 'random', 'model.head.align_weight': 1.0},
        {'optim_wrapper.type': 'AmpOptimWrapper'},
    ],
)
def test_harmless_changes_of_pretraining(pretraining, options):
    assert check(pretraining, options) == []


def test_value_is_shown(pretraining):
    [finding] = check(pretraining, {'model.backbone.window_size': 2})
    lines = str(finding._replace(remedy='leave it out')).splitlines()
    assert lines[0] == 'error    model.backbone.window_size = 2'
    assert lines[1].startswith('         CAEViT: pretraining sees')
    assert lines[-1] == '         -> leave it out'


def test_pipeline_of_pretraining(pretraining):
    load, crop, mask, pack = Config.fromfile(pretraining).train_dataloader.dataset.pipeline
    findings = check(pretraining, {PIPELINE: [load, crop, pack]})
    expect(findings, 'error', PIPELINE, 'no mask', 'cae_mm.CAEMaskGenerator', 'after the crop')
    findings = check(pretraining, {PIPELINE: [load, mask, crop, pack]})
    expect(findings, 'error', f'{PIPELINE}.1.patch_size', 'put CAEMaskGenerator after the crop')
    other = dict(type='mmpretrain.BEiTMaskGenerator', input_size=4, num_masking_patches=8)
    assert check(pretraining, {PIPELINE: [load, crop, other, pack]}) == []


def test_pixel_targets(pretraining):
    options = {
        'model.target_generator': dict(_delete_=True, type='cae_mm.RGBTarget'),
        'model.neck.out_dims': 3 * PATCH**2,
    }
    key = f'{PIPELINE}.1.second_size'
    expect(check(pretraining, options), 'note', key, 'view 2 is made for nothing', 'None')
    assert check(pretraining, options | {key: None}) == []


def test_dalle_has_its_own_range(pretraining):
    dalle = dict(_delete_=True, type='cae_mm.DALLEEncoder', n_hid=8, vocab_size=VOCAB)
    options = {'model.target_generator': dalle}
    mean, std = check(pretraining, options)
    assert mean.key == 'model.data_preprocessor.second_mean'
    assert '(318.75, 318.75, 318.75)' in std.remedy
    options['model.data_preprocessor.second_mean'] = [-31.875] * 3
    options['model.data_preprocessor.second_std'] = [318.75] * 3
    assert check(pretraining, options) == []


def test_learning_rate_with_more_processes(pretraining):
    options, machine = {'train_dataloader.drop_last': False}, Machine(8, 'cuda')
    expect(check(pretraining, options, machine), 'warning', LR, '16 = 8 x 2 x 1', 'makes 0.008')
    assert check(pretraining, options | FITTED, machine) == []


def test_no_recipe_to_compare_with(pretraining):
    cfg = Config.fromfile(pretraining)
    cfg.auto_scale_lr = None
    cfg.dump(pretraining)
    expect(check(pretraining), 'note', 'auto_scale_lr', 'lr=0.001', 'base_batch_size')


def test_sync_bn(classifier):
    neck = dict(type='cae_mm.ViTFeaturePyramid', in_channels=16, patch_size=PATCH, strides=(1,))

    def check_norms(machine: Machine) -> list[Finding]:
        findings = check(classifier, {'model.neck': neck}, machine)
        return [finding for finding in findings if 'SyncBN' in finding.text]

    expect(check_norms(GPU), 'note', 'model', 'SyncBN (neck.levels.0.1', 'plain BN')
    assert check_norms(Machine(2)) == check_norms(Machine(2, 'cuda')) == []


@pytest.mark.parametrize(
    ('options', 'level', 'key', 'words'),
    [
        ({'frozen_stages': 1}, 'error', 'frozen_stages', 'frozen_stages=2'),
        ({'frozen_stages': -1}, 'error', 'frozen_stages', 'frozen_stages=2'),
        ({'drop_path_rate': 0.1}, 'warning', 'drop_path_rate', 'leave'),
        ({'out_type': 'raw'}, 'error', 'out_type', 'LinearProbeHead'),
        ({'out_type': 'featmap'}, 'error', 'out_type', 'LinearProbeHead'),
    ],
)
def test_mistake_in_a_probe(classifier, options, level, key, words):
    options = {f'model.backbone.{name}': value for name, value in options.items()}
    expect(check(classifier, options), level, f'model.backbone.{key}', words)


def test_attentive_probe(classifier):
    options = {'model.head.type': 'cae_mm.AttentiveProbeHead', 'model.head.num_heads': 2}
    for out_type in ('cls_token', 'featmap'):
        findings = check(classifier, options | {'model.backbone.out_type': out_type})
        expect(findings, 'error', 'model.backbone.out_type', 'AttentiveProbeHead', "'raw'")
    assert check(classifier, options | {'model.backbone.out_type': 'raw'}) == []


def test_fine_tuning_is_no_probe(classifier):
    options = dict(frozen_stages=-1, drop_path_rate=0.1, use_rel_pos_bias=True)
    options = {f'model.backbone.{key}': value for key, value in options.items()}
    options |= {
        'model.backbone.out_type': 'avg_featmap',
        'model.head.type': 'mmpretrain.LinearClsHead',
    }
    assert check(classifier, options) == []


def test_misspelt_key_of_a_class_with_options(classifier):
    findings = check(classifier, {'model.head.top_k': (1,)})
    expect(findings, 'error', 'model.head.top_k', "unexpected keyword argument 'top_k'")
    assert findings[1].level == 'note'


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (dict(mean=[127.5] * 3, std=[127.5] * 3), 'mean=(127.5, 127.5, 127.5)'),
        (dict(to_rgb=False), '57.375), BGR; '),
        (dict(mean=None, std=None), 'nothing'),
    ],
)
def test_normalization_other_than_in_pretraining(classifier, trained, pretrained, change, words):
    options = {f'model.data_preprocessor.{key}': value for key, value in change.items()}
    key = 'model.data_preprocessor'
    expect(check(classifier, options), 'warning', key, words, 'epoch_1.pth', 'mean=(123.675, 116')
    write(pretrained, trained, described=False)
    options['model.backbone.pretrain_img_size'] = SIDE
    expect(check(classifier, options), 'warning', key, words, 'ImageNet', 'mean=(123.675, 116')


def test_normalization_of_own_pretraining(classifier, pretraining, trained, pretrained):
    key = 'model.data_preprocessor'
    write(pretrained, trained, mean=(1.0, 2.0, 3.0))
    expect(check(classifier), 'warning', key, 'epoch_1.pth', 'mean=(1, 2, 3)')
    assert check(classifier, {f'{key}.mean': [1.0, 2.0, 3.0]}) == []
    # pretraining that goes on from it
    init = dict(type='Pretrained', checkpoint=str(pretrained), prefix='backbone.')
    expect(check(pretraining, {'model.backbone.init_cfg': init}), 'warning', key)


def test_normalization_of_the_first_round(pretraining, trained, tmp_path):
    path = tmp_path / 'tokenizer.safetensors'
    kmeans = dict(
        type='cae_mm.KMeansTokenizer', backbone=cae_config()['backbone'], vocab_size=VOCAB
    )
    encoder = replace(describe_model(trained), mean=(1.0, 2.0, 3.0))
    state = MODELS.build(kmeans).state_dict()
    write_safetensors(path, state, dict(encoder=encoder.to_dict()))
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    options = {
        'model.target_generator': kmeans | dict(_delete_=True, init_cfg=init_cfg),
        f'{PIPELINE}.1.second_size': None,
    }
    key = 'model.data_preprocessor'
    expect(check(pretraining, options), 'warning', key, 'tokenizer.safetensors', 'mean=(1, 2, 3)')
    assert check(pretraining, options | {f'{key}.mean': [1.0, 2.0, 3.0]}) == []


def test_normalization_at_the_top_of_the_config(classifier):
    cfg = Config.fromfile(classifier)
    cfg.data_preprocessor = cfg.model.pop('data_preprocessor')
    cfg.dump(classifier)
    assert check(classifier) == []
    expect(check(classifier, {'data_preprocessor.to_rgb': False}), 'warning', 'data_preprocessor')


def test_positions_of_another_size(classifier, trained, pretrained):
    size, named = 'model.backbone.img_size', 'model.backbone.pretrain_img_size'
    assert check(classifier, {size: 32}) == []  # positions follow what the file says
    write(pretrained, trained, described=False)
    expect(check(classifier), 'note', size, 'does not say its size of pretraining')
    assert check(classifier, {named: 16}) == []


@pytest.mark.parametrize('converted', [True, False])
def test_heads(classifier, trained, pretrained, tmp_path, converted):
    options = {}
    description = replace(describe_model(trained), num_heads=4)
    if converted:
        pretrained = tmp_path / 'converted.safetensors'
        state = trained.backbone.state_dict()
        write_safetensors(pretrained, state, dict(encoder=description.to_dict()))
        init = dict(_delete_=True, type='Pretrained', checkpoint=str(pretrained))
        options = {'model.backbone.init_cfg': init}
    else:
        write(pretrained, trained, num_heads=4)
    expect(check(classifier, options), 'error', INIT, 'made with 4 heads', 'has 2', 'num_heads')


def test_missing_files(classifier, pretraining, tmp_path):
    [finding] = check(classifier, {INIT: 'absent.pth'})
    expect([finding], 'error', INIT, str(Path('absent.pth').absolute()))
    assert finding.value == 'absent.pth'
    expect(check(classifier, {'load_from': 'absent.pth'}), 'error', 'load_from', 'absent.pth')
    path = tmp_path / 'absent.pth'
    [finding] = check(classifier, checkpoint=path)
    assert (finding.level, finding.key, finding.value) == ('error', 'CHECKPOINT', str(path))
    url = {INIT: 'https://example.org/cae.pth'}
    expect(check(classifier, url), 'error', INIT, 'download https://example.org/cae.pth first')
    init = dict(type='Pretrained', checkpoint='absent.pth')
    key = 'model.target_generator.init_cfg'
    expect(check(pretraining, {key: init}), 'error', f'{key}.checkpoint', 'tokenizer')


def test_file_of_something_else(classifier, tmp_path):
    path = tmp_path / 'dvae.pth'
    torch.save(dict(state_dict=dict(weight=torch.zeros(1))), path)
    expect(check(classifier, checkpoint=path), 'error', 'CHECKPOINT', 'does not fit CAEViT')


class Malice:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def test_nothing_in_a_checkpoint_is_executed(classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict={}, meta=Malice()), 'evil.pth')
    findings = check(classifier, checkpoint=Path('evil.pth'))
    expect(findings, 'error', 'CHECKPOINT', 'nothing in it was executed')
    assert not Path('executed').exists()


@pytest.mark.parametrize('prefix', ['', 'encoder.'])
def test_wrong_prefix(classifier, prefix):
    findings = check(classifier, {'model.backbone.init_cfg.prefix': prefix})
    expect(findings, 'error', INIT, "keys under prefix='backbone.'")


def test_wrong_arch(classifier):
    arch = dict(embed_dims=32, depth=2, num_heads=2, layer_scale=0.1)
    findings = check(classifier, {'model.backbone.arch': arch, 'model.head.in_channels': 32})
    expect(findings, 'error', INIT, 'The file has width 16, the model 32')


def test_encoder_alone_for_a_whole_model(pretraining, trained, tmp_path):
    path = tmp_path / 'encoder.pth'
    torch.save(trained.backbone.state_dict(), path)
    for options in ({'load_from': str(path)}, {'load_from': str(path), 'resume': True}):
        expect(check(pretraining, options), 'error', 'load_from', 'bare encoder', 'init_cfg')
    expect(check(pretraining, checkpoint=path), 'error', 'CHECKPOINT', 'init_cfg')
    init = dict(type='Pretrained', checkpoint=str(path))
    assert check(pretraining, {'model.backbone.init_cfg': init}) == []


def test_pretraining_file_for_a_whole_classifier(classifier, pretrained):
    options = {'model.backbone.init_cfg': None}
    findings = check(classifier, options | {'load_from': str(pretrained)})
    expect(findings, 'note', 'load_from', 'missing: head.', 'unexpected: neck.')
    begun = check(classifier, options | {'load_from': str(pretrained), 'resume': 'auto'})
    expect(begun, 'note', 'load_from', 'missing: head.', 'unexpected: neck.')
    expect(check(classifier, options, checkpoint=pretrained), 'error', 'CHECKPOINT', 'head.')


def test_whole_classifier_to_be_tested(classifier, tmp_path):
    path = write(tmp_path / 'best.pth', MODELS.build(Config.fromfile(classifier).model))
    absent = {INIT: 'absent.pth'}
    assert check(classifier, absent, checkpoint=path) == []  # that is not needed then
    findings = check(classifier, {'model.head.num_classes': 3}, checkpoint=path)
    expect(findings, 'error', 'CHECKPOINT', 'head.fc.weight is (2, 16) in the file')


@pytest.mark.parametrize(('gamma', 'level'), [(1e-3, 'warning'), (2.0, 'note'), (0.3, None)])
def test_layer_scale(pretraining, classifier, pretrained, gamma, level):
    content = torch.load(pretrained, weights_only=True)
    content['state_dict']['backbone.blocks.0.gamma_1'].fill_(-gamma)
    torch.save(content, pretrained)
    findings = check(pretraining, checkpoint=pretrained)
    if level is None:
        assert findings == []
    else:
        expect(findings, level, 'CHECKPOINT', f'layer scale is {gamma:.2g} on average')
    assert check(classifier) == []  # there the weights of the file are all that counts


def test_no_layer_scale_is_one(pretraining, pretrained):
    content = torch.load(pretrained, weights_only=True)
    content['state_dict']['backbone.blocks.0.gamma_1'].fill_(0.05)
    torch.save(content, pretrained)
    findings = check(pretraining, {'model.backbone.arch.layer_scale': None}, checkpoint=pretrained)
    expect(findings, 'warning', 'CHECKPOINT', 'layer scale is 0.05 on average', '1 in the arch')


def test_missing_data(classifier, folder):
    root = 'dataset.data_root'
    for name, level in zip(LOADERS, ('error', 'error', 'warning'), strict=True):
        findings = check(classifier, {f'{name}.{root}': '/absent'})  # training needs no test data
        expect(findings, level, f'{name}.{root}', '/absent does not exist')
    for name, value in (('data_prefix', 'absent'), ('ann_file', 'absent.txt')):
        key = f'val_dataloader.dataset.{name}'
        expect(check(classifier, {key: value}), 'error', key, f'{folder / value} does not exist')
    assert check(classifier, {f'train_dataloader.{root}': 's3://bucket'}) == []  # not here


def test_missing_data_in_wrappers(classifier):
    plain = Config.fromfile(classifier).train_dataloader.dataset
    absent = dict(plain, data_root='/absent')
    both = dict(_delete_=True, type='ConcatDataset', datasets=[plain, absent])
    wrapped = dict(type='RepeatDataset', times=2, dataset=both, _delete_=True)
    for dataset, key in ((both, 'dataset'), (wrapped, 'dataset.dataset')):
        findings = check(classifier, {'train_dataloader.dataset': dataset})
        expect(findings, 'error', f'train_dataloader.{key}.datasets.1.data_root', '/absent')


@DATASETS.register_module()
class MixOfImages:
    """As mmdet's MultiImageMixDataset: transforms of its own around a dataset, no files."""

    def __init__(self, **_):
        pass


def test_datasets_around_others_have_no_files(classifier):
    plain = Config.fromfile(classifier).train_dataloader.dataset
    absent = dict(plain, data_root='/absent')
    mix = dict(type='MixOfImages', dataset=absent, pipeline=[], _delete_=True)
    findings = check(classifier, {'train_dataloader.dataset': mix})
    assert 'train_dataloader.dataset.dataset.data_root' in [finding.key for finding in findings]


def test_unknown_dataset(classifier):
    findings = check(classifier, {'train_dataloader.dataset.type': 'mmpretrain.CustomDatset'})
    expect(findings, 'error', 'train_dataloader.dataset', 'mmpretrain.CustomDatset is not in the')


def test_too_few_images(classifier):
    key = 'train_dataloader.batch_size'
    scaled = {'auto_scale_lr.enable': True}
    assert check(classifier, scaled | {key: 6}) == []
    expect(check(classifier, scaled | {key: 7}), 'error', key, '6 images', f'{key}=6')
    findings = check(classifier, scaled | {key: 4}, Machine(3, 'cuda'))
    expect(findings, 'error', key, '6 images are 2 a process')
    for name, value in (('drop_last', False), ('sampler', dict(type='InfiniteSampler'))):
        assert check(classifier, scaled | {key: 7, f'train_dataloader.{name}': value}) == []


def test_shards(classifier, folder, tmp_path):
    run_tool('make_shards.py', folder / 'train', tmp_path / 'shards')
    options = {'settings.shards': str(tmp_path / 'shards'), 'train_dataloader.batch_size': 6}
    assert check(classifier, options | {'auto_scale_lr.enable': True}) == []
    key = 'train_dataloader.batch_size'
    scaled = {'auto_scale_lr.enable': True, key: 7}
    expect(check(classifier, options | scaled), 'error', key, '6 images')
    path = tmp_path / 'shards/000000.tar'
    path.write_bytes(path.read_bytes()[:3000])
    options |= {'auto_scale_lr.enable': True}
    expect(check(classifier, options), 'error', 'train_dataloader.dataset', 'is cut short in')


def test_folder_without_images(classifier, tmp_path):
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    findings = check(classifier, {'train_dataloader.dataset.data_root': str(tmp_path)})
    expect(findings, 'error', 'train_dataloader.dataset', 'no images in', 'none of 0 files ends')


def test_images_that_cannot_be_read(classifier, tmp_path):
    for i in range(6):
        path = tmp_path / 'train' / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('no image')
    options = {'train_dataloader.dataset.data_root': str(tmp_path)}
    findings = check(classifier, options)
    expect(findings, 'error', f'{PIPELINE}.0', '.png', 'on_error=skip')
    options[f'{PIPELINE}.0.on_error'] = 'skip'
    expect(check(classifier, options), 'error', PIPELINE, 'none of', 'images')


def test_package_that_cannot_be_imported(classifier, monkeypatch):
    def import_module(name: str) -> None:
        raise ImportError(f'no {name}')

    monkeypatch.setattr(case, 'import_module', import_module)
    head = dict(_delete_=True, type='mmseg.UPerHead')
    expect(check(classifier, {'model.decode_head': head}), 'note', 'model', 'mmseg', 'no mmseg.mo')


def test_config_that_cannot_be_read(tmp_path):
    path = tmp_path / 'broken.py'
    expect(check(path), 'error', 'CONFIG', str(path))
    for text in ("_base_ = './absent.py'", 'model = dict('):
        path.write_text(text)
        expect(check(path), 'error', 'CONFIG', 'cannot be read: ')
    path.write_text('model = dict()')
    expect(check(path, {'settings.img_sise': 1}), 'error', 'CONFIG', 'did you mean img_size?')


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
    assert Machine.detect() == Machine.detect(0) == Machine(1, 'cpu')
    assert Machine.detect(8) == Machine(8, 'cuda')  # not seen here
    monkeypatch.setenv('WORLD_SIZE', '4')
    assert Machine.detect() == Machine(4, 'cpu')
    assert str(Machine(4)) == '4 CPU processes' and str(Machine(1, 'cuda')) == '1 GPU'
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert Machine.detect() == Machine(4, 'cuda')
    monkeypatch.delenv('WORLD_SIZE')
    assert Machine.detect() == Machine(2, 'cuda')


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_own_config_has_no_findings(path, monkeypatch):
    if path not in FAMILIES:  # tests/test_configs.py trains each for a step
        checks = tuple(check for check in report.CHECKS if check is not trial.check_batch)
        monkeypatch.setattr(report, 'CHECKS', checks)
    findings = check(path)
    assert not [f for f in findings if f.level != 'note' and not is_missing_file(f)]


def is_missing_file(finding: Finding) -> bool:
    """Data and weights are not part of a checkout."""
    return 'does not exist' in finding.text or 'no weights for' in finding.text
