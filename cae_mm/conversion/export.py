"""Carry weights out: to mmpretrain, timm, Hugging Face and the official code.

Before anything is written, the other project's own network is filled with the weights and has to
give the same features on a test image.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cae_mm.checkpoints import Checkpoint, EncoderDescription, read_checkpoint
from cae_mm.checkpoints.pretrained import find_file, strip_prefix
from cae_mm.conversion.convert import PARTS, name_output, translate
from cae_mm.conversion.rules import Row, to_foreign
from cae_mm.conversion.sizes import describe_weights, fixed_tensors
from cae_mm.conversion.sources import INDEX, OFFICIAL, OFFICIAL_FINETUNED, TABLE
from cae_mm.conversion.targets import TARGETS, Network, Target
from cae_mm.models import build_encoder
from cae_mm.patches import grid_of, to_pair

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the largest value


@dataclass
class Export:
    """What went out."""

    path: Path  # the file or folder written
    rows: list[Row]  # what became of each key
    remarks: list[str]  # what was assumed
    # largest difference of features over the largest feature, by precision; empty where the check
    # is the way back instead ('official')
    errors: dict[torch.dtype, float]
    usage: str  # how the other project loads it


def export_checkpoint(
    source_path: str | Path,
    out: str | Path,
    target: str,
    *,
    part: str | None = None,
    num_heads: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    pooled: bool | None = None,
) -> Export:
    """Write one of our checkpoints as another project stores it.

    Args:
        source_path: A checkpoint of this project, ``.pth`` of training or converted
            ``.safetensors``, with the encoder under ``backbone.``.
        out: File or folder to write; the name gets '_encoder' or '_full'.
        target: 'mmpretrain', 'timm', 'huggingface' or 'official'.
        part: 'encoder', or 'full' for all that the target has a place for (the default).
        num_heads: Heads of the encoder, if the file does not tell; default as in ``ARCHS``.
        img_size: Size of the images, if the file does not tell; default 224.
        pooled: Whether the final norm belongs to the mean of the patch tokens (fine-tuning) or to
            each token (pretraining), if the file does not tell; by default the first if there
            are relative position tables.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the target's package is not installed.
        ValueError: If the weights have no exact place there, or an option contradicts the file.
        RuntimeError: If the other network gives other features.
    """
    if target not in (*TARGETS, 'official'):
        raise ValueError(f"Unknown target '{target}': choose one of {(*TARGETS, 'official')}")
    if part not in (None, *PARTS):
        raise ValueError(f"Unknown part '{part}': choose one of {PARTS}")
    path = find_file(source_path, 'export')
    file = read_checkpoint(path)
    remarks: list[str] = []
    size = None if img_size is None else to_pair(img_size)
    description = file.description or _assume(file, num_heads, size, pooled, remarks)
    for name, given in dict(num_heads=num_heads, img_size=size, pooled_norm=pooled).items():
        told = getattr(description, name)
        if given not in (None, told):
            raise ValueError(f'{path} tells {name}={told}, not {given}: leave the option out')
    if part == 'encoder':
        places: tuple[str, ...] = ('backbone',)
    elif target == 'official':
        places = ('backbone', 'neck' if 'neck.mask_token' in file.state else 'head')
    else:
        places = TARGETS[target].places
    state = {k: v for k, v in file.state.items() if k.split('.')[0] in places}
    left = Counter(k.split('.')[0] for k in file.state if k not in state)
    try:
        if target == 'official':
            rows, errors, write = _to_official(state, description)
        else:
            rows, errors, write = _to_network(TARGETS[target], state, description)
    except ValueError as error:
        raise ValueError(f'{path} cannot be exported to {target}: {error}') from error
    rows += [Row('(left out)', f'{k}.{{rest}}', n, 'not exported') for k, n in left.items()]
    suffix = '.pth' if target == 'official' else TARGETS[target].suffix
    place = name_output(out, path, state, suffix)
    return Export(place, rows, remarks, errors, write(place))


def _assume(
    file: Checkpoint,
    num_heads: int | None,
    img_size: tuple[int, int] | None,
    pooled: bool | None,
    remarks: list[str],
) -> EncoderDescription:
    """Describe the encoder of a file that does not; adds remarks on what is assumed."""
    for key in ('backbone.cls_token', 'backbone.patch_embed.proj.weight'):
        if key not in file.state:
            raise ValueError(
                f'{file.path} is no checkpoint of this project: it has no {key!r}. Weights of '
                'others are brought in with tools/convert_checkpoint.py'
            )
    if img_size is None:
        remarks.append('pictures of 224x224 pixels assumed: --img-size')
    if pooled is None:
        pooled = any(key.endswith(TABLE) for key in file.state)
        how = 'the mean of the patch tokens' if pooled else 'each token'
        remarks.append(f'the final norm is assumed to be applied to {how}: --pool')
    patch_size = file.state['backbone.patch_embed.proj.weight'].shape[-1]
    try:
        return describe_weights(
            file.state,
            source='',
            num_heads=num_heads,
            grids=(grid_of(img_size or (224, 224), patch_size),) * 2,
            pooled_norm=pooled,
            remarks=remarks,
        )
    except ValueError as error:
        raise ValueError(f'{file.path} cannot be exported: {error}') from error


def _to_network(
    target: Target, state: dict[str, Tensor], description: EncoderDescription
) -> tuple[list[Row], dict[torch.dtype, float], Callable[[Path], str]]:
    """Fill the other project's network, compare features, and return how it is written."""
    if target.needs_norm and not description.final_norm:
        raise ValueError(
            'it has no final norm (it is of dense prediction), the network there always does'
        )
    classes = len(state['head.fc.weight']) if 'head.fc.weight' in state else 0
    network = target.build(description, classes)
    network.module.eval()
    computed = fixed_tensors(description)
    result = to_foreign(state, computed, target.rules, description.pooled_norm)
    other = network.module.state_dict()
    # the index of relative positions is stored by some versions only
    weights = {k: v for k, v in result.state.items() if k in other or not k.endswith(INDEX)}
    network.module.load_state_dict(weights)
    ours = build_encoder(description).eval()
    ours.load_state_dict(strip_prefix(state, 'backbone.'))
    errors = _compare_features(ours, network, (description.in_channels, *description.img_size))
    network.module.float().load_state_dict(weights)  # undo the rounding of the comparison
    return result.rows, errors, network.write


@torch.no_grad()
def _compare_features(
    ours: nn.Module, other: Network, shape: tuple[int, ...]
) -> dict[torch.dtype, float]:
    """Compare the largest difference on a seeded random image with ``TOLERANCES``."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((1, *shape), generator=generator, dtype=torch.float64)
    errors = {}
    for dtype, tolerance in TOLERANCES.items():
        expected = ours.to(dtype)(images.to(dtype))[0]
        other.module.to(dtype)
        actual = other.features(images.to(dtype))
        errors[dtype] = ((actual - expected).abs().max() / expected.abs().max()).item()
        if not errors[dtype] <= tolerance:
            raise RuntimeError(
                f'the exported network gives other features in {dtype}: they differ by '
                f'{errors[dtype]:.2g} of the largest, at most {tolerance:g} is rounding. Nothing '
                'was written; please report this with the versions that '
                '`python -m cae_mm.doctor` prints'
            )
    return errors


def _to_official(
    state: dict[str, Tensor], description: EncoderDescription
) -> tuple[list[Row], dict[torch.dtype, float], Callable[[Path], str]]:
    """Give weights the official names, and check that the way back gives the same."""
    neck_width = state['neck.mask_token'].shape[-1] if 'neck.mask_token' in state else None
    finetuned = 'head.fc.weight' in state or description.pooled_norm
    rules = OFFICIAL_FINETUNED if finetuned else OFFICIAL
    computed = fixed_tensors(description, neck_width)
    result = to_foreign(state, computed, rules, description.pooled_norm)
    weights = result.state
    if neck_width is None and not finetuned:
        weights = {k: v for k, v in weights.items() if k.startswith('encoder.')}
    back = translate(weights, 'official', num_heads=description.num_heads).state
    if back.keys() != state.keys() or any(not torch.equal(back[k], state[k]) for k in state):
        raise RuntimeError('the way back from official names gives other weights')

    def write(place: Path) -> str:
        torch.save({'model': weights}, place)
        return f'--finetune {place}, --model_key model (official run_class_finetuning.py)'

    return result.rows, {}, write
