"""What is to be as it was in pretraining or as the tokenizer wants it: nothing else tells."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from cae_mm.checkpoints import EncoderDescription
from cae_mm.datasets import CAEMaskGenerator, TwoViewResizedCrop
from cae_mm.doctor.case import Case
from cae_mm.doctor.finding import Finding, type_name
from cae_mm.doctor.weights import find_loads, read_file
from cae_mm.models import (
    CAEDataPreprocessor,
    CAEFeatures,
    CLIPFeatures,
    DALLEEncoder,
    DiscreteVAE,
    TimmFeatures,
    describe_model,
)
from cae_mm.models.archs import ARCHS

MAX_LAYER_SCALE_FACTOR = 10
# mean and std that bring pixels into the range that a tokenizer or feature target reads
RANGES = {
    DALLEEncoder: (-31.875, 318.75, '0.8 x + 0.1 with x in [0, 1]'),
    DiscreteVAE: (127.5, 127.5, 'images in [-1, 1]'),
    **dict.fromkeys((CAEFeatures, CLIPFeatures, TimmFeatures), (0, 255, 'images in [0, 1]')),
}


def check_pretrained(case: Case) -> Iterator[Finding]:
    """Compare the encoder and its images with what the file says that it starts from."""
    loads = [load for load in find_loads(case) if load.module in ('', 'backbone')]
    if case.encoder is None or not loads:
        return
    load = loads[-1]
    checkpoint = read_file(case, load.path)
    prefix = load.prefix if load.module else 'backbone.'
    if checkpoint is None or f'{prefix}cls_token' not in checkpoint.state:
        return  # `check_weights` says what is wrong
    description = case.attempt(getattr, checkpoint, 'description')
    if isinstance(description, Exception):
        return  # likewise
    yield from _check_normalization(case, load.path, description)
    gamma = checkpoint.state.get(f'{prefix}blocks.0.gamma_1')
    if case.pretrains and gamma is not None:
        yield from _check_layer_scale(case, load.key, gamma.float().abs().mean().item())
    elif not case.pretrains and description is None:
        key = 'model.backbone.img_size'
        size = case.encoder.describe().pretrain_img_size
        if not case.get('model.backbone.pretrain_img_size') and size != (224, 224):
            text = f'{load.path} does not say its size of pretraining: this is taken for it'
            yield case.finding('note', key, text, 'else set model.backbone.pretrain_img_size')


def _check_normalization(
    case: Case, path: str, of_file: EncoderDescription | None
) -> Iterator[Finding]:
    """Images are to be normalised as they were in pretraining, by default as ImageNet's."""
    known = of_file if of_file is not None and of_file.mean is not None else None
    in_pipeline = any(type_name(node).endswith('Normalize') for _, node in case.typed)
    if in_pipeline or (case.pretrains and not known):
        return
    # our own preprocessor in the model has no values on the meta device
    models: list[Any] = [
        SimpleNamespace(backbone=case.encoder, data_preprocessor=preprocessor)
        for preprocessor in (case.preprocessor, CAEDataPreprocessor())
    ]
    actual, default = (describe_model(model) for model in models)
    expected = known or default
    if _images(actual, digits=3) != _images(expected, digits=3):  # but for rounding
        top = case.get('data_preprocessor') and not case.get('model.data_preprocessor')
        key = 'data_preprocessor' if top else 'model.data_preprocessor'
        source = f'{path} was made with' if known else 'pretraining has by default (ImageNet)'
        text = f'images are normalised by {_images(actual)}; {source} {_images(expected)}'
        yield case.finding('warning', key, text, f'set {key} as in pretraining')


def _images(description: Any, digits: int = 6) -> str:
    order = 'RGB' if description.to_rgb else 'BGR'
    if description.mean is None or description.std is None:
        return f'nothing, {order}'
    mean, std = (_numbers(v, digits) for v in (description.mean, description.std))
    return f'mean={mean}, std={std}, {order}'


def _numbers(values: Any, digits: int) -> str:
    return f'({", ".join(f"{value:.{digits}g}" for value in values)})'


def _check_layer_scale(case: Case, key: str, mean: float) -> Iterator[Finding]:
    """Layer scales grow in training, CAE-L's from 1e-5, but nothing makes them shrink."""
    arch = case.get('model.backbone.arch', 'base')
    initial = (ARCHS[arch] if isinstance(arch, str) else arch)['layer_scale'] or 1.0
    if 1 / MAX_LAYER_SCALE_FACTOR <= mean / initial <= MAX_LAYER_SCALE_FACTOR:
        return
    level = 'warning' if mean < initial else 'note'
    cause = 'it was initialised otherwise' if mean < initial else 'it grew, or began otherwise'
    text = f'layer scale is {mean:.2g} on average in its first block, {initial:g} in the arch: '
    remedy = 'check layer_scale of model.backbone.arch; the weights of the file are what counts'
    yield case.finding(level, key, f'{text}{cause}', remedy)


def check_tokenizer(case: Case) -> Iterator[Finding]:
    """A tokenizer with an encoder of a first round reads the images that this encoder read."""
    for load in find_loads(case):
        checkpoint = read_file(case, load.path) if load.module == 'target_generator' else None
        description = case.attempt(getattr, checkpoint, 'description')
        if isinstance(description, EncoderDescription):
            yield from _check_normalization(case, load.path, description)


def check_views(case: Case) -> Iterator[Finding]:
    """The second view against the range that the tokenizer or feature target reads."""
    if not case.pretrains or not isinstance(case.preprocessor, CAEDataPreprocessor):
        return
    target = type(case.model.target_generator)
    *expected, meaning = RANGES.get(target, (None,))
    buffers = (case.preprocessor.means, case.preprocessor.stds)
    for name, value, buffer in zip(('second_mean', 'second_std'), expected, buffers, strict=False):
        key, actual = f'model.data_preprocessor.{name}', buffer[1].flatten().tolist()
        if _numbers(actual, 3) != _numbers([value] * 3, 3):
            text = f'{target.__name__} reads {meaning}; {name} is {actual}'
            yield case.finding('warning', key, text, f'set {key}={(value,) * 3}')


def check_transforms(case: Case) -> Iterator[Finding]:
    """A second view that nothing reads, and blocks larger than all that is masked."""
    if not case.pretrains:
        return
    patches = math.prod(case.model.backbone.grid)
    for key, step in case.transforms.items():
        if isinstance(step, TwoViewResizedCrop):
            if len(step.views) - 1 > case.model.target_generator.view:
                text = 'the targets come from view 1: view 2 is made for nothing'
                yield case.finding('note', f'{key}.second_size', text, 'set second_size=None')
        elif isinstance(step, CAEMaskGenerator) and step.strategy == 'block':
            masked = step.count_masked(patches)
            if step.min_block > masked > 0:
                text = f'blocks of {step.min_block} do not fit: {masked} of {patches} are masked'
                remedy = f'set min_block={max(masked // 6, 1)}, in proportion to 16 of 98'
                yield case.finding('warning', f'{key}.min_block', text, remedy)
