"""Everything of ours is reachable as ``cae_mm.X`` from any scope, and nowhere else."""

import subprocess
import sys
from pathlib import Path

import mmpretrain.registry
import pytest
from builders import WIDTH, cae_config
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    HOOKS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    RUNNERS,
    TRANSFORMS,
    DefaultScope,
    Registry,
)

import cae_mm.registry
from cae_mm import datasets, engine, hooks, models

# a scope whose package is not installed makes mmengine warn and go on from the root registry
SCOPES = pytest.mark.parametrize('scope', ['mmengine', 'mmpretrain', 'mmseg', 'mmdet'])
ROOTS = {
    *(DATASETS, DATA_SAMPLERS, HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS),
    *(OPTIM_WRAPPERS, OPTIMIZERS, RUNNERS, TRANSFORMS),
}
OUR_CLASSES = {
    name: getattr(package, name)
    for package in (datasets, engine, hooks, models)
    for name in package.__all__
    if isinstance(getattr(package, name), type)
}
MODEL = cae_config(target_generator=dict(type='cae_mm.DALLEEncoder', n_hid=4, vocab_size=32))
PARTS = [MODEL[name] for name in ('backbone', 'neck', 'head', 'target_generator')]
CONSTRUCTOR = dict(
    type='cae_mm.LayerDecayOptimWrapperConstructor',
    optim_wrapper_cfg=dict(
        type='cae_mm.MixedPrecisionOptimWrapper', optimizer=dict(type='SGD', lr=0.1)
    ),
    paramwise_cfg=dict(layer_decay_rate=0.65),
)
HEAD = dict(num_classes=2, in_channels=WIDTH)
CONFIGS = [
    *((MODELS, part) for part in [MODEL, *PARTS, cae_config()['target_generator']]),
    (MODELS, dict(type='cae_mm.RGBTarget')),
    (MODELS, dict(type='cae_mm.HOGTarget')),
    (MODELS, dict(type='cae_mm.CAEFeatures', backbone=PARTS[0], patch_size=4)),
    (MODELS, dict(type='cae_mm.TimmFeatures', name='test_vit', checkpoint='', patch_size=16)),
    (MODELS, dict(type='cae_mm.CAEDataPreprocessor')),
    (MODELS, dict(type='cae_mm.LinearProbeHead', **HEAD)),
    (MODELS, dict(type='cae_mm.AttentiveProbeHead', num_heads=2, **HEAD)),
    (MODELS, dict(type='cae_mm.ViTFeaturePyramid', in_channels=8)),
    (HOOKS, dict(type='cae_mm.SafeLoadHook')),
    (HOOKS, dict(type='cae_mm.KNNHook', train='train', val='val')),
    (TRANSFORMS, dict(type='cae_mm.LoadImage')),
    (TRANSFORMS, dict(type='cae_mm.TwoViewResizedCrop')),
    (TRANSFORMS, dict(type='cae_mm.CAEMaskGenerator')),
    (TRANSFORMS, dict(type='cae_mm.CheckSegMap')),
    (OPTIM_WRAPPER_CONSTRUCTORS, CONSTRUCTOR),
]


@SCOPES
@pytest.mark.parametrize(
    ('registry', 'cfg'), [pytest.param(*config, id=config[1]['type']) for config in CONFIGS]
)
def test_builds_under_every_default_scope(registry, cfg, scope):
    with DefaultScope.overwrite_default_scope(scope):
        built = registry.build(cfg)
    assert type(built) is OUR_CLASSES[cfg['type'].removeprefix('cae_mm.')]


@SCOPES
def test_nested_types_are_ours(scope):
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(MODEL)
        wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(CONSTRUCTOR)(model)
    parts = (model.backbone, model.neck, model.head, model.target_generator)
    assert [f'cae_mm.{type(part).__name__}' for part in parts] == [cfg['type'] for cfg in PARTS]
    for part in (*parts, model.data_preprocessor, wrapper):
        assert type(part) is OUR_CLASSES[type(part).__name__]


@SCOPES
def test_every_public_class_has_its_name_in_one_registry(scope):
    with DefaultScope.overwrite_default_scope(scope):
        for name, kind in OUR_CLASSES.items():
            names = [root.name for root in ROOTS if root.get(f'cae_mm.{name}') is kind]
            assert len(names) == 1, name


def test_mmpretrains_and_mmengines_registries_hold_nothing_of_ours():
    """There are a CAE, a CAENeck, ... of mmpretrain's own; a second one there is a KeyError."""
    registries = [r for r in vars(mmpretrain.registry).values() if isinstance(r, Registry)]
    assert {registry.scope for registry in registries} == {'mmengine', 'mmpretrain'}
    for registry in registries:
        modules = {getattr(kind, '__module__', '') for kind in registry.module_dict.values()}
        assert not any(module.startswith('cae_mm') for module in modules), registry


def test_ours_and_mmpretrains_do_not_hide_each_other():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        namesake = MODELS.get('mmpretrain.CAE')
        assert namesake.__module__.startswith('mmpretrain.')
        assert MODELS.get('cae_mm.CAE') is models.CAE
        with MODELS.switch_scope_and_registry(None) as registry:
            assert registry.get('CAE') is namesake
            assert registry.get('CAEViT') is None


def test_our_registries_are_children_of_mmengines_roots():
    registries = [getattr(cae_mm.registry, name) for name in cae_mm.registry.__all__]
    assert {registry.parent for registry in registries} == ROOTS
    for registry in registries:
        assert registry.scope == 'cae_mm'
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
    HOOKS.build(dict(type='cae_mm.GumbelTemperatureHook')),
]
print(*(type(x).__module__ for x in built))
"""


@pytest.mark.parametrize('preamble', ['import cae_mm.registry', ''], ids=['imported', 'not'])
def test_a_fresh_process_finds_everything(preamble):
    """With ``cae_mm.registry`` imported, as by custom_imports, and with nothing imported."""
    script = SCRIPT.format(preamble=preamble, cfg=MODEL['backbone'])
    command = [sys.executable, '-W', 'ignore', '-c', script]
    root = Path(cae_mm.__file__).parents[1]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    modules = ['cae_mm.models.vit', 'cae_mm.datasets.masking', 'cae_mm.hooks.schedules']
    assert run.stdout.split()[-3:] == modules, run.stderr


def test_unknown_name_is_an_error():
    with pytest.raises(KeyError, match=r'cae_mm\.CAEVit is not in the mmengine::model registry'):
        MODELS.build(dict(type='cae_mm.CAEVit'))


def test_misspelt_option_is_an_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'drop_path'"):
        MODELS.build(MODEL['backbone'] | dict(drop_path=0.1))
