"""Everything of ours is reachable as ``cae_mm.X`` from any scope, and nowhere else."""

import subprocess
import sys
from pathlib import Path

import mmpretrain.registry
import pytest
from mmengine.registry import (
    HOOKS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    TRANSFORMS,
    DefaultScope,
    Registry,
)

import cae_mm.registry
from cae_mm import datasets, engine, hooks, models

# a scope whose package is not installed makes mmengine warn and go on from the root registry
SCOPES = ['mmengine', 'mmpretrain', 'mmseg', 'mmdet']
ROOTS = [HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS, TRANSFORMS]
OUR_CLASSES = {
    name: getattr(package, name)
    for package in (datasets, engine, hooks, models)
    for name in package.__all__
    if isinstance(getattr(package, name), type)
}

BACKBONE = dict(
    type='cae_mm.CAEViT',
    arch=dict(embed_dims=8, depth=1, num_heads=1, layer_scale=0.1),
    img_size=32,
)
NECK = dict(
    type='cae_mm.CAENeck',
    in_dims=8,
    embed_dims=8,
    num_heads=1,
    regressor_depth=1,
    decoder_depth=1,
    out_dims=16,
)
TOKENIZER = dict(type='cae_mm.DALLEEncoder', n_hid=4, vocab_size=16)
MODEL = dict(
    type='cae_mm.CAE',
    backbone=BACKBONE,
    neck=NECK,
    head=dict(type='cae_mm.CAEPretrainHead'),
    target_generator=TOKENIZER,
)
WRAPPER = dict(type='cae_mm.BF16OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
CONSTRUCTOR = dict(
    type='cae_mm.LayerDecayOptimWrapperConstructor',
    optim_wrapper_cfg=WRAPPER,
    paramwise_cfg=dict(layer_decay_rate=0.65),
)
CONFIGS = [
    (MODELS, MODEL),
    (MODELS, BACKBONE),
    (MODELS, NECK),
    (MODELS, TOKENIZER),
    (MODELS, dict(type='cae_mm.CAEPretrainHead')),
    (MODELS, dict(type='cae_mm.DiscreteVAE', vocab_size=8, codebook_dims=4, hidden_dims=4)),
    (MODELS, dict(type='cae_mm.RGBTarget')),
    (MODELS, dict(type='cae_mm.CAEDataPreprocessor')),
    (MODELS, dict(type='cae_mm.LinearProbeHead', num_classes=2, in_channels=8)),
    (MODELS, dict(type='cae_mm.AttentiveProbeHead', num_classes=2, in_channels=8, num_heads=2)),
    (MODELS, dict(type='cae_mm.ViTFeaturePyramid', in_channels=8)),
    (HOOKS, dict(type='cae_mm.SafeLoadHook')),
    (HOOKS, dict(type='cae_mm.KNNHook', train='train', val='val')),
    (TRANSFORMS, dict(type='cae_mm.LoadImage')),
    (TRANSFORMS, dict(type='cae_mm.TwoViewResizedCrop')),
    (TRANSFORMS, dict(type='cae_mm.CAEMaskGenerator')),
    (OPTIM_WRAPPER_CONSTRUCTORS, CONSTRUCTOR),
]


@pytest.mark.parametrize('scope', SCOPES)
@pytest.mark.parametrize(
    ('registry', 'cfg'), [pytest.param(*config, id=config[1]['type']) for config in CONFIGS]
)
def test_builds_under_every_default_scope(registry, cfg, scope):
    with DefaultScope.overwrite_default_scope(scope):
        built = registry.build(cfg)
    name = cfg['type'].removeprefix('cae_mm.')
    assert type(built) is OUR_CLASSES[name]


@pytest.mark.parametrize('scope', SCOPES)
def test_nested_types_are_ours(scope):
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(MODEL)
        wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(CONSTRUCTOR)(model)
    assert type(model.backbone) is models.CAEViT
    assert type(model.neck) is models.CAENeck
    assert type(model.head) is models.CAEPretrainHead
    assert type(model.target_generator) is models.DALLEEncoder
    assert type(model.data_preprocessor) is models.CAEDataPreprocessor
    assert type(wrapper) is engine.BF16OptimWrapper


@pytest.mark.parametrize('scope', SCOPES)
def test_every_public_class_has_its_name_in_one_registry(scope):
    with DefaultScope.overwrite_default_scope(scope):
        for name, kind in OUR_CLASSES.items():
            found = [root.name for root in ROOTS if root.get(f'cae_mm.{name}') is kind]
            assert len(found) == 1, name


def test_mmpretrains_and_mmengines_registries_hold_nothing_of_ours():
    """There are a CAE, a CAENeck, ... of mmpretrain's own; a second one there is a KeyError."""
    registries = [r for r in vars(mmpretrain.registry).values() if isinstance(r, Registry)]
    assert {registry.scope for registry in registries} == {'mmengine', 'mmpretrain'}
    for registry in registries:
        ours = [
            name
            for name, kind in registry.module_dict.items()
            if getattr(kind, '__module__', '').startswith('cae_mm')
        ]
        assert not ours, registry


def test_ours_and_mmpretrains_do_not_hide_each_other():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        theirs = MODELS.get('mmpretrain.CAE')
        assert theirs.__module__.startswith('mmpretrain.')
        assert MODELS.get('cae_mm.CAE') is models.CAE
        with MODELS.switch_scope_and_registry(None) as registry:
            assert registry.get('CAE') is theirs
            assert registry.get('CAEViT') is None


def test_our_registries_are_children_of_mmengines_roots():
    for name in cae_mm.registry.__all__:
        registry = getattr(cae_mm.registry, name)
        assert registry.scope == 'cae_mm'
        assert registry.parent.scope == 'mmengine'
        assert registry.parent.children['cae_mm'] is registry


SCRIPT = """
import sys
{preamble}
from mmengine.registry import HOOKS, MODELS, TRANSFORMS, DefaultScope

assert 'cae_mm.models' not in sys.modules
assert 'cae_mm.datasets' not in sys.modules
DefaultScope.get_instance('test', scope_name='mmpretrain')
built = [
    MODELS.build({cfg}),
    TRANSFORMS.build(dict(type='cae_mm.CAEMaskGenerator')),
    HOOKS.build(dict(type='cae_mm.EpochSeedHook')),
]
print(*(type(x).__module__ for x in built))
"""


@pytest.mark.parametrize('preamble', ['import cae_mm.registry', ''], ids=['imported', 'not'])
def test_a_fresh_process_finds_everything(preamble):
    """With ``cae_mm.registry`` imported, as by custom_imports, and with nothing imported."""
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', SCRIPT.format(preamble=preamble, cfg=BACKBONE)],
        cwd=Path(cae_mm.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-3:] == [
        'cae_mm.models.vit',
        'cae_mm.datasets.masking',
        'cae_mm.hooks.training',
    ]


def test_unknown_name_is_an_error():
    with pytest.raises(KeyError, match=r'cae_mm\.CAEVit is not in the mmengine::model registry'):
        MODELS.build(dict(type='cae_mm.CAEVit'))


def test_misspelt_option_is_an_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'drop_path'"):
        MODELS.build(BACKBONE | dict(drop_path=0.1))
