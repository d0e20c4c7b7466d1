"""Carry weights out: to mmpretrain, timm, Hugging Face and the official code.

Before anything is written, the other project's own network is filled with the weights and has to
give the same features on a test image.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from cae_mm.checkpoints import Checkpoint, EncoderDescription, read_checkpoint
from cae_mm.checkpoints.pretrained import find_file
from cae_mm.conversion.convert import PARTS, translate
from cae_mm.conversion.rules import Row, Rule, Translation, to_theirs
from cae_mm.conversion.sizes import OUR_HEADS, describe_weights, fixed_tensors, resolve_heads
from cae_mm.conversion.sources import (
    HUGGINGFACE,
    INDEX,
    MMPRETRAIN,
    OFFICIAL,
    OFFICIAL_FINETUNED,
    TABLE,
    TIMM,
)
from cae_mm.models import build_encoder
from cae_mm.patches import grid_of, to_pair

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the largest value


@dataclass
class Export:
    """What went out.

    Attributes:
        path: The file or folder written.
        rows: What became of each key.
        remarks: What was assumed.
        errors: Largest difference of features over the largest feature, by precision; empty where
            the check is the way back instead ('official').
        usage: How the other project loads it.
    """

    path: Path
    rows: list[Row]
    remarks: list[str]
    errors: dict[torch.dtype, float]
    usage: str


@dataclass(frozen=True)
class Target:
    """Another project that has a network of its own to compare with.

    Attributes:
        rules: Its table.
        parts: What of our model it has a place for.
        needs_norm: Whether its network always has a final norm.
        build: Makes the network from our description and the number of classes (0 without).
        features: Its tokens, or (last argument) their pooled mean, for images.
        write: Writes weights and network to a path, and says how they are loaded.
        suffix: Of the file; '' for a folder.
    """

    rules: list[Rule]
    parts: tuple[str, ...]
    needs_norm: bool
    build: Callable[[EncoderDescription, int], nn.Module]
    features: Callable[[nn.Module, Tensor, bool], Tensor]
    write: Callable[[nn.Module, Path], str]
    suffix: str


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
    if file.description is None:
        description = _assume(file, num_heads, size, pooled, remarks)
    else:
        description = file.description
        _check_options(description, path, num_heads=num_heads, img_size=size, pooled_norm=pooled)
    state, rows = _select(file.state, ('backbone',) if part == 'encoder' else _parts(target, file))
    try:
        if target == 'official':
            result = _to_official(state, description)
            place = _name(Path(out), path, state, '.pth')
            torch.save({'model': result.state}, place)
            usage = f'--finetune {place}, --model_key model (official run_class_finetuning.py)'
            return Export(place, result.rows + rows, remarks, {}, usage)
        there = TARGETS[target]
        network, result, errors = _to_network(there, state, description)
    except ValueError as error:
        raise ValueError(f'{path} cannot be exported to {target}: {error}') from error
    place = _name(Path(out), path, state, there.suffix)
    return Export(place, result.rows + rows, remarks, errors, there.write(network, place))


def _assume(
    file: Checkpoint,
    num_heads: int | None,
    img_size: tuple[int, int] | None,
    pooled: bool | None,
    remarks: list[str],
) -> EncoderDescription:
    """Describe the encoder of a file that does not; adds remarks on what is assumed.

    Raises:
        ValueError: If the file has no encoder, or its number of heads cannot be told.
    """
    tables = any(key.endswith(TABLE) for key in file.state)
    if img_size is None:
        remarks.append('pictures of 224x224 pixels assumed: --img-size')
    if pooled is None:
        how = 'the mean of the patch tokens' if tables else 'each token'
        remarks.append(f'the final norm is assumed to be applied to {how}: --pool')
    try:
        heads = resolve_heads(file.state, num_heads, OUR_HEADS, remarks)
        patch_size = file.state['backbone.patch_embed.proj.weight'].shape[-1]
        grid = grid_of(img_size or (224, 224), patch_size)
        return describe_weights(
            file.state,
            num_heads=heads,
            grid=grid,
            pretrain_grid=grid,
            pooled_norm=tables if pooled is None else pooled,
        )
    except KeyError as error:
        raise ValueError(
            f'{file.path} is no checkpoint of this project: it has no {error}. Weights of others '
            'are brought in with tools/convert_checkpoint.py'
        ) from error
    except ValueError as error:
        raise ValueError(f'{file.path} cannot be exported: {error}') from error


def _check_options(description: EncoderDescription, path: Path, **options: Any) -> None:
    """Refuse options that contradict the file."""
    for name, given in options.items():
        told = getattr(description, name)
        if given not in (None, told):
            raise ValueError(f'{path} tells {name}={told}, not {given}: leave the option out')


def _parts(target: str, file: Checkpoint) -> tuple[str, ...]:
    if target != 'official':
        return TARGETS[target].parts
    return ('backbone', 'neck') if 'neck.mask_token' in file.state else ('backbone', 'head')


def _select(
    state: dict[str, Tensor], parts: tuple[str, ...]
) -> tuple[dict[str, Tensor], list[Row]]:
    """Keep ``parts``, and make a row of the report for each other one."""
    kept = {k: v for k, v in state.items() if k.split('.')[0] in parts}
    left = [k.split('.')[0] for k in state if k not in kept]
    return kept, [
        Row('(left out)', f'{name}.{{rest}}', left.count(name), 'not exported')
        for name in dict.fromkeys(left)
    ]


def _name(out: Path, source: Path, state: dict[str, Tensor], suffix: str) -> Path:
    """Return the path to write: named after ``out``, or after the source if that is a folder."""
    out = out.expanduser()
    if suffix and out.is_dir():
        out = out / source.stem
    part = 'encoder' if all(k.startswith('backbone.') for k in state) else 'full'
    stem = out.name.removesuffix(suffix) if suffix else out.name
    if not stem.endswith(f'_{part}'):
        stem += f'_{part}'
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.with_name(stem + suffix)


def _to_network(
    target: Target, state: dict[str, Tensor], description: EncoderDescription
) -> tuple[nn.Module, Translation, dict[torch.dtype, float]]:
    """Fill the other project's network and compare features."""
    if target.needs_norm and not description.final_norm:
        raise ValueError(
            'it has no final norm (it is of dense prediction), the network there always does'
        )
    classes = len(state['head.fc.weight']) if 'head.fc.weight' in state else 0
    network = target.build(description, classes).eval()
    result = to_theirs(state, target.rules, fixed_tensors(description), description.pooled_norm)
    theirs = network.state_dict()
    # the index of relative positions is stored by some versions only
    weights = {k: v for k, v in result.state.items() if k in theirs or not k.endswith(INDEX)}
    network.load_state_dict(weights)
    ours = build_encoder(description).eval()
    ours.load_state_dict(
        {k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith('backbone.')}
    )
    errors = compare_features(ours, network, target, description)
    network.float().load_state_dict(weights)  # undo the rounding of the comparison
    return network, result, errors


@torch.no_grad()
def compare_features(
    ours: nn.Module, theirs: nn.Module, target: Target, description: EncoderDescription
) -> dict[torch.dtype, float]:
    """Compare both networks on a seeded random image, in float64 and float32.

    Returns:
        The largest difference over the largest feature, by precision.

    Raises:
        RuntimeError: If it is above ``TOLERANCES``.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, description.in_channels, *description.img_size)
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    errors = {}
    for dtype, tolerance in TOLERANCES.items():
        expected = ours.to(dtype)(images.to(dtype))[0]
        actual = target.features(theirs.to(dtype), images.to(dtype), description.pooled_norm)
        errors[dtype] = ((actual - expected).abs().max() / expected.abs().max()).item()
        if not errors[dtype] <= tolerance:
            raise RuntimeError(
                f'the exported network gives other features in {dtype}: they differ by '
                f'{errors[dtype]:.2g} of the largest, at most {tolerance:g} is rounding. Nothing '
                'was written; please report this with the versions that '
                '`python -m cae_mm.doctor` prints'
            )
    return errors


def _to_official(state: dict[str, Tensor], description: EncoderDescription) -> Translation:
    """Give weights the official names, and check that the way back gives the same."""
    has_neck = 'neck.mask_token' in state
    finetuned = 'head.fc.weight' in state or description.pooled_norm
    neck_width = state['neck.mask_token'].shape[-1] if has_neck else None
    result = to_theirs(
        state,
        OFFICIAL_FINETUNED if finetuned else OFFICIAL,
        fixed_tensors(description, neck_width),
        description.pooled_norm,
    )
    if not has_neck and not finetuned:
        result.state = {k: v for k, v in result.state.items() if k.startswith('encoder.')}
    back = translate(result.state, 'official', num_heads=description.num_heads).state
    if back.keys() != state.keys() or any(not torch.equal(back[k], state[k]) for k in state):
        raise RuntimeError('the way back from official names gives other weights')
    return result


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{package} is needed for this: pip install -c constraints/onedl.txt '.[export]' "
            '(constraints/openmmlab.txt with the upstream packages)'
        ) from error


def _build_mmpretrain(d: EncoderDescription, classes: int) -> nn.Module:
    importlib.import_module('mmpretrain.models')
    config = dict(
        type='mmpretrain.BEiTViT',
        arch=dict(
            embed_dims=d.embed_dims,
            num_layers=d.depth,
            num_heads=d.num_heads,
            feedforward_channels=int(d.embed_dims * d.mlp_ratio),
        ),
        img_size=d.img_size,
        patch_size=d.patch_size,
        in_channels=d.in_channels,
        norm_cfg=dict(type='LN', eps=1e-6),
        final_norm=d.final_norm and not d.pooled_norm,
        out_type='avg_featmap' if d.pooled_norm else 'raw',
        use_abs_pos_emb=True,
        use_rel_pos_bias=d.use_rel_pos_bias,
    )
    network: Any = nn.Module()
    network.config = config
    network.backbone = MODELS.build(config)
    if classes:
        network.head = nn.Module()
        network.head.fc = nn.Linear(d.embed_dims, classes)
    return network


def _mmpretrain_features(network: Any, images: Tensor, pooled: bool) -> Tensor:
    return network.backbone(images)[0]


def _write_mmpretrain(network: Any, place: Path) -> str:
    torch.save({'state_dict': network.state_dict(), 'meta': {}}, place)
    init_cfg = dict(type='Pretrained', checkpoint=str(place), prefix='backbone.')
    return f'backbone={network.config | dict(init_cfg=init_cfg)}'


def _build_timm(d: EncoderDescription, classes: int) -> nn.Module:
    return _require('timm').create_model(
        'beit_base_patch16_224',  # the class is Beit; all of its sizes are given below
        pretrained=False,
        img_size=d.img_size,
        patch_size=d.patch_size,
        in_chans=d.in_channels,
        embed_dim=d.embed_dims,
        depth=d.depth,
        num_heads=d.num_heads,
        mlp_ratio=d.mlp_ratio,
        init_values=0.1,
        use_abs_pos_emb=True,
        use_rel_pos_bias=d.use_rel_pos_bias,
        global_pool='avg' if d.pooled_norm else 'token',
        num_classes=classes,
    )


def _timm_features(network: Any, images: Tensor, pooled: bool) -> Tensor:
    tokens = network.forward_features(images)
    return network.forward_head(tokens, pre_logits=True) if pooled else tokens


def _write_timm(network: Any, place: Path) -> str:
    models = importlib.import_module('timm.models')
    models.save_for_hf(network, place, safe_serialization=True)
    return f"timm.create_model('local-dir:{place}', pretrained=True)"


def _build_huggingface(d: EncoderDescription, classes: int) -> nn.Module:
    if d.img_size[0] != d.img_size[1]:
        raise ValueError("Hugging Face's BeitModel takes square images only")
    transformers = _require('transformers')
    config = transformers.BeitConfig(
        hidden_size=d.embed_dims,
        num_hidden_layers=d.depth,
        num_attention_heads=d.num_heads,
        intermediate_size=int(d.embed_dims * d.mlp_ratio),
        image_size=d.img_size[0],
        patch_size=d.patch_size,
        num_channels=d.in_channels,
        layer_norm_eps=1e-6,
        layer_scale_init_value=0.1,
        use_absolute_position_embeddings=True,
        use_relative_position_bias=d.use_rel_pos_bias,
        use_mean_pooling=d.pooled_norm,
    )
    return transformers.BeitModel(config)


def _huggingface_features(network: Any, images: Tensor, pooled: bool) -> Tensor:
    output = network(images)
    return output.pooler_output if pooled else output.last_hidden_state


def _write_huggingface(network: Any, place: Path) -> str:
    network.save_pretrained(place)
    return f"transformers.BeitModel.from_pretrained('{place}')"


TARGETS = {
    'mmpretrain': Target(
        rules=MMPRETRAIN,
        parts=('backbone', 'head'),
        needs_norm=False,
        build=_build_mmpretrain,
        features=_mmpretrain_features,
        write=_write_mmpretrain,
        suffix='.pth',
    ),
    'timm': Target(
        rules=TIMM,
        parts=('backbone', 'head'),
        needs_norm=True,
        build=_build_timm,
        features=_timm_features,
        write=_write_timm,
        suffix='',
    ),
    'huggingface': Target(
        rules=HUGGINGFACE,
        parts=('backbone',),
        needs_norm=True,
        build=_build_huggingface,
        features=_huggingface_features,
        write=_write_huggingface,
        suffix='',
    ),
}
