"""Carry weights out: to mmpretrain, timm, Hugging Face and the official code.

Before anything is written, the other project's own network is filled with the weights and has to
give the same features on a test image; the official code, which is no package, is not there, so
its weights have to come back the same.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cae_mm.checkpoints import EncoderDescription, read_checkpoint
from cae_mm.checkpoints.pretrained import find_file, strip_prefix
from cae_mm.conversion.card import write_card
from cae_mm.conversion.convert import PARTS, name_output, translate
from cae_mm.conversion.rules import LeaveOut, Rule, to_foreign
from cae_mm.conversion.sizes import describe_weights, fixed_tensors
from cae_mm.conversion.sources import INDEX, TABLE
from cae_mm.conversion.targets import TARGETS, Network
from cae_mm.models import build_encoder
from cae_mm.patches import to_pair

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the largest value


@dataclass
class Export:
    """What went out."""

    path: Path  # the file or folder written
    counts: dict[Rule, int]  # keys that each rule made or left out
    remarks: list[str]  # what was assumed
    # largest difference of features over the largest, by precision; none if checked by way back
    errors: dict[torch.dtype, float]
    usage: str  # how the other project loads it
    card: Path  # what the file is, in words


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
    if target not in TARGETS:
        raise ValueError(f"Unknown target '{target}': choose one of {tuple(TARGETS)}")
    if part not in (None, *PARTS):
        raise ValueError(f"Unknown part '{part}': choose one of {PARTS}")
    path = find_file(source_path, 'export')
    file = read_checkpoint(path)
    size = None if img_size is None else to_pair(img_size)
    description = file.description
    remarks: list[str] = []
    for name, given in dict(num_heads=num_heads, img_size=size, pooled_norm=pooled).items():
        told = getattr(description, name, given)
        if given not in (None, told):
            raise ValueError(f'{path} tells {name}={told}, not {given}: leave the option out')
    places = {'backbone'} if part == 'encoder' else set(TARGETS[target].places)
    # the neck of dense prediction has no mask token, and pretraining no classifier
    places.discard('head' if 'neck.mask_token' in file.state else 'neck')
    state = {k: v for k, v in file.state.items() if k.split('.')[0] in places}
    left = Counter(k.split('.')[0] for k in file.state if k not in state)
    try:
        if description is None:
            description, remarks = _assume(file.state, num_heads, size, pooled)
        network, weights, counts, errors = _fill(target, state, description)
    except ValueError as error:
        raise ValueError(f'{path} cannot be exported to {target}: {error}') from error
    counts |= {LeaveOut('(left out)', f'{k}.{{rest}}', 'not exported'): n for k, n in left.items()}
    place = name_output(out, path, state, TARGETS[target].suffix)
    usage = network.write(place, weights)
    beside = usage.replace(
        str(place), place.name
    )  # as the card, which lies beside the file, has it
    code = network.code.format(usage=beside)
    card = write_card(
        place,
        description,
        file,
        library=target,
        code=code or beside,
        checked=_tell_errors(errors),
        language='python' if code else 'text',
    )
    return Export(place, counts, remarks, errors, usage, card)


def _tell_errors(errors: dict[torch.dtype, float]) -> str:
    if not errors:
        return 'converted back, all weights are bit for bit the same'
    found = (f'{error:.1e} of the largest in {dtype}' for dtype, error in errors.items())
    return f'features of a random image differ by {", ".join(found)}'


def _assume(
    state: dict[str, Tensor],
    num_heads: int | None,
    img_size: tuple[int, int] | None,
    pooled: bool | None,
) -> tuple[EncoderDescription, list[str]]:
    """Describe the encoder of a file that does not, and say what is assumed."""
    if 'backbone.cls_token' not in state:
        raise ValueError(
            "it is no checkpoint of this project, it has no 'backbone.cls_token'. Weights of "
            'others are brought in with tools/convert_checkpoint.py'
        )
    remarks = []
    if img_size is None:
        img_size = 224, 224
        remarks.append('pictures of 224x224 pixels assumed: --img-size')
    if pooled is None:
        pooled = any(key.endswith(TABLE) for key in state)
        how = 'the mean of the patch tokens' if pooled else 'each token'
        remarks.append(f'the final norm is assumed to be applied to {how}: --pool')
    description, more = describe_weights(
        state, source='', num_heads=num_heads, img_size=img_size, pooled_norm=pooled
    )
    return description, remarks + more


def _fill(
    target: str, state: dict[str, Tensor], description: EncoderDescription
) -> tuple[Network, dict[str, Tensor], dict[Rule, int], dict[torch.dtype, float]]:
    """Translate the weights, fill the other project's network, and check what came out."""
    if TARGETS[target].needs_norm and not description.final_norm:
        raise ValueError(
            'it has no final norm (it is of dense prediction), the network there always does'
        )
    if description.window_size is not None:
        raise ValueError(
            f'its blocks attend within windows of {description.window_size} patches, no network '
            'there does'
        )
    network = TARGETS[target].build(description, state)
    computed = fixed_tensors(description, state)
    weights, counts = to_foreign(state, computed, network.rules, description.pooled_norm)
    if network.module is None:
        back = translate(weights, target, num_heads=description.num_heads).state
        if back.keys() != state.keys() or any(not torch.equal(back[k], state[k]) for k in state):
            raise RuntimeError(f'the way back from {target} names gives other weights')
        return network, weights, counts, {}
    known = network.module.state_dict()
    # the index of relative positions is stored by some versions only
    weights = {k: v for k, v in weights.items() if k in known or not k.endswith(INDEX)}
    network.module.load_state_dict(weights)
    ours = build_encoder(description).eval()
    ours.load_state_dict(strip_prefix(state, 'backbone.'))
    shape = (description.in_channels, *description.img_size)
    errors = _compare_features(ours, network.module.eval(), network.features, shape)
    network.module.float().load_state_dict(weights)  # undo the rounding of the comparison
    return network, weights, counts, errors


@torch.no_grad()
def _compare_features(
    ours: nn.Module,
    other: nn.Module,
    features: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
) -> dict[torch.dtype, float]:
    """Compare the largest difference on a seeded random image with ``TOLERANCES``."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((1, *shape), generator=generator, dtype=torch.float64)
    errors = {}
    for dtype, tolerance in TOLERANCES.items():
        expected = ours.to(dtype)(images.to(dtype))[0]
        other.to(dtype)
        actual = features(images.to(dtype))
        errors[dtype] = ((actual - expected).abs().max() / expected.abs().max()).item()
        if not errors[dtype] <= tolerance:
            raise RuntimeError(
                f'the exported network gives other features in {dtype}: they differ by '
                f'{errors[dtype]:.2g} of the largest, at most {tolerance:g} is rounding. Nothing '
                'was written; please report this with the versions that '
                '`python -m cae_mm.doctor` prints'
            )
    return errors
