"""Types and keys, whether all can be built, and what belongs together in the model."""

import difflib
from collections.abc import Iterator
from inspect import Parameter, signature
from typing import Any

from mmengine.registry import Registry

from cae_mm import registry as own_registries
from cae_mm.datasets import CAEMaskGenerator, TwoViewResizedCrop
from cae_mm.doctor.case import Case, Finding, quiet
from cae_mm.doctor.failures import explain, failure
from cae_mm.models import AttentiveProbeHead, LinearProbeHead
from cae_mm.models.targets import RGBTarget
from cae_mm.patches import Grid

# what mmengine takes out of a dict before it reaches the class
MMENGINE_KEYS = {'type', 'constructor', 'paramwise_cfg', 'priority', '_scope_', '_delete_'}


def check_types(case: Case) -> Iterator[Finding]:
    """Types of ours that do not exist or lack their scope, and keys that they do not know."""
    own = _own_classes()
    for key, node in case.typed:
        if not isinstance(node['type'], str):
            continue
        scope, _, name = node['type'].rpartition('.')
        if scope == 'cae_mm' and name not in own:
            yield case.found(
                'error',
                f'{key}.type',
                f'cae_mm has no {name}',
                f'choose {_similar(name, own, "one of")}',
            )
        elif scope == 'cae_mm':
            yield from _check_keys(case, key, node, own[name][1])
        elif not scope and name in own and case.scope != 'cae_mm':
            yield from _check_scope(case, key, name, own[name][0])


def _own_classes() -> dict[str, tuple[Registry, Any]]:
    """Everything that is registered in our scope, with its registry."""
    found: dict[str, tuple[Registry, Any]] = {}
    for name in own_registries.__all__:
        registry: Registry = getattr(own_registries, name)
        registry.import_from_location()
        found |= {key: (registry, value) for key, value in registry.module_dict.items()}
    return found


def _check_keys(case: Case, key: str, node: dict[str, Any], cls: Any) -> Iterator[Finding]:
    parameters = signature(cls).parameters
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        return  # building it tells
    for name in node.keys() - parameters.keys() - MMENGINE_KEYS:
        yield case.found(
            'error',
            f'{key}.{name}',
            f'{cls.__name__} has no argument {name}',
            f'choose {_similar(name, parameters, "one of")}, or leave it out',
        )


def _check_scope(case: Case, key: str, name: str, registry: Registry) -> Iterator[Finding]:
    assert registry.parent is not None
    with quiet(), registry.parent.switch_scope_and_registry(case.scope) as scoped:
        found = scoped.get(name)
    remedy = f"write type='cae_mm.{name}', or '{case.scope}.{name}' if that is meant"
    if found is None:
        yield case.found(
            'error', f'{key}.type', f'the scope {case.scope} has no {name}, cae_mm has', remedy
        )
    else:
        text = f'without a scope this is {found.__module__}.{name}, not that of cae_mm'
        yield case.found('warning', f'{key}.type', text, remedy)


def _similar(name: str, names: Any, otherwise: str) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return close[0] if close else f'{otherwise} {", ".join(sorted(names))}'


def check_model(case: Case) -> Iterator[Finding]:
    """Whether the model can be built; it is built without memory, on the meta device."""
    for scope, error in case.unusable_scopes.items():
        yield Finding(
            'note',
            'model',
            f'model and transforms are not checked, since {scope} cannot be imported here: '
            f'{explain(error)}',
            'python -m cae_mm.doctor tells how to install it',
        )
    if isinstance(case.built, Exception):
        yield failure(case, 'model', case.built)
        yield Finding(
            'note',
            'model',
            'it cannot be built: views, positions, normalisation and weights are not checked yet',
            'look again when it can be',
        )


def check_transforms(case: Case) -> Iterator[Finding]:
    """Whether the steps of the pipelines can be built."""
    for key, built in case.transforms.items():
        if isinstance(built, Exception):
            yield failure(case, key, built)


def check_views(case: Case) -> Iterator[Finding]:
    """Views and masks of pretraining against the encoder's grid and the tokenizer."""
    encoder = case.encoder
    if not case.pretrains or encoder is None:
        return
    for dataset in (key for key in case.datasets if key.startswith('train_dataloader')):
        steps = {
            key: step
            for key, step in case.transforms.items()
            if key.startswith(f'{dataset}.pipeline.')
        }
        crops = [key for key, step in steps.items() if isinstance(step, TwoViewResizedCrop)]
        masks = [key for key, step in steps.items() if isinstance(step, CAEMaskGenerator)]
        for key in crops:
            yield from _check_crop(case, key, steps[key], encoder.grid)
        for key in masks:
            yield from _check_mask(case, key, steps[key], encoder.grid)
        yield from _check_order(case, f'{dataset}.pipeline', crops, masks)


def _check_crop(case: Case, key: str, crop: TwoViewResizedCrop, grid: Grid) -> Iterator[Finding]:
    p = case.get('model.backbone.patch_size', 16)
    want, have = tuple(side * p for side in grid), crop.views[0][0]
    if have != want:
        yield case.found(
            'error',
            f'{key}.size',
            f'view 1 has {_by(have)} pixels, but model.backbone.img_size says {_by(want)}',
            f'set size={want}, or model.backbone.img_size={have}',
        )
    target: Any = case.model.target_generator  # type: ignore[union-attr]  # it is CAE
    if isinstance(target, RGBTarget):
        if len(crop.views) > 1:
            yield case.found(
                'note',
                f'{key}.second_size',
                'pixel targets come from view 1: view 2 is made for nothing',
                'set second_size=None',
            )
        return
    reduction = getattr(target, 'reduction', None)
    second = tuple(side * reduction for side in grid) if reduction else None
    if second and (len(crop.views) < 2 or crop.views[1][0] != second):
        yield case.found(
            'error',
            f'{key}.second_size',
            f'{_by(grid)} patches need as many tokens, each of {reduction} pixels of a side',
            f'set second_size={second}',
        )


def _check_mask(case: Case, key: str, mask: CAEMaskGenerator, grid: Grid) -> Iterator[Finding]:
    p = case.get('model.backbone.patch_size', 16)
    if mask.patch_size != p:
        yield case.found(
            'error',
            f'{key}.patch_size',
            f'masks are made for patches of {mask.patch_size} pixels, the encoder has {p}',
            f'set patch_size={p}',
        )
        return
    patches = grid[0] * grid[1]
    masked = int(mask.mask_ratio * patches)
    if masked == 0:
        yield case.found(
            'error',
            f'{key}.mask_ratio',
            f'{mask.mask_ratio} hides none of {patches} patches',
            f'set it above {1 / patches:.3g}',
        )
    elif mask.strategy == 'block' and mask.min_block > masked:
        yield case.found(
            'warning',
            f'{key}.min_block',
            f'blocks of {mask.min_block} patches do not fit: {masked} of {patches} are masked',
            f'set min_block={max(masked // 6, 1)}, in proportion to 16 of 98',
        )


def _check_order(case: Case, key: str, crops: list[str], masks: list[str]) -> Iterator[Finding]:
    names = [str(step['type']) for step in case.get(key, [])]
    if not masks and not any('Mask' in name for name in names):
        yield case.found(
            'error',
            key,
            'nothing makes masks',
            "add dict(type='cae_mm.CAEMaskGenerator', patch_size=..., mask_ratio=0.5) after the "
            'crop',
        )
    if crops and masks and int(masks[0].rpartition('.')[2]) < int(crops[-1].rpartition('.')[2]):
        yield case.found(
            'error',
            masks[0],
            'masks are made for the image before it is cropped',
            'put CAEMaskGenerator after TwoViewResizedCrop',
        )


def check_probe(case: Case) -> Iterator[Finding]:
    """A probe judges an encoder that stays as it is."""
    encoder, head = case.encoder, getattr(case.model, 'head', None)
    if encoder is None or not isinstance(head, LinearProbeHead):
        return
    if encoder.frozen_stages != encoder.depth:
        yield case.found(
            'error',
            'model.backbone.frozen_stages',
            f'a probe trains the head alone, but not all {encoder.depth} blocks are frozen',
            f'set frozen_stages={encoder.depth}',
        )
    if case.get('model.backbone.drop_path_rate', 0) > 0:
        yield case.found(
            'warning',
            'model.backbone.drop_path_rate',
            'a probe has no drop path (paper); blocks that are frozen ignore it',
            'leave drop_path_rate out',
        )
    wanted = ('raw',) if isinstance(head, AttentiveProbeHead) else ('cls_token', 'avg_featmap')
    if encoder.out_type not in wanted:
        yield case.found(
            'error',
            'model.backbone.out_type',
            f'{type(head).__name__} cannot read out_type={encoder.out_type!r}',
            f'set out_type={wanted[0]!r}',
        )


def check_pretraining_options(case: Case) -> Iterator[Finding]:
    """Options of the encoder that pretraining, which sees some patches only, cannot have."""
    if not case.pretrains or case.encoder is None:
        return
    for name in ('use_rel_pos_bias', 'window_size'):
        if case.get(f'model.backbone.{name}'):
            yield case.found(
                'error',
                f'model.backbone.{name}',
                'pretraining sees some patches only, which have no windows and no relative '
                'position bias',
                f'leave {name} out; fine-tuning may have it',
            )


def _by(sides: tuple[int, ...]) -> str:
    return 'x'.join(map(str, sides))
