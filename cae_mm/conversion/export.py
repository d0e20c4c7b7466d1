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

from cae_mm.checkpoints.files import read_metadata, read_state_dict
from cae_mm.checkpoints.pretrained import find_file, name_some
from cae_mm.conversion.convert import PARTS, build_encoder, fixed_tensors, grid_from, translate
from cae_mm.conversion.rules import Row, Rule, Translation, count_blocks, to_theirs
from cae_mm.conversion.sources import (
    HUGGINGFACE,
    INDEX,
    MMPRETRAIN,
    OFFICIAL,
    OFFICIAL_FINETUNED,
    TABLE,
    TIMM,
)
from cae_mm.models.vit import ARCHS
from cae_mm.patches import to_pair

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
        build: Makes the network from sizes, pooling and number of classes (0 without).
        features: Its tokens, or their pooled mean, for images.
        write: Writes weights and network to a path, and says how they are loaded.
        suffix: Of the file; '' for a folder.
    """

    rules: list[Rule]
    parts: tuple[str, ...]
    needs_norm: bool
    build: Callable[[dict[str, Any], int], nn.Module]
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
        num_heads: Heads of the encoder, where the file does not tell; default as in ``ARCHS``.
        img_size: Size of the images, where the file does not tell; default 224.
        pooled: Whether the final norm belongs to the mean of the patch tokens (fine-tuning) or to
            each token (pretraining), where the file does not tell; by default the first if there
            are relative position tables.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the target's package is not installed.
        ValueError: If the weights have no exact place there.
        RuntimeError: If the other network gives other features.
    """
    if target not in (*TARGETS, 'official'):
        raise ValueError(f"Unknown target '{target}': choose one of {(*TARGETS, 'official')}")
    if part not in (None, *PARTS):
        raise ValueError(f"Unknown part '{part}': choose one of {PARTS}")
    path = find_file(source_path, 'export')
    state = read_state_dict(path)
    metadata = read_metadata(path)
    remarks: list[str] = []
    if 'encoder' not in metadata:
        metadata = describe(state, path, num_heads, img_size, pooled, remarks)
    parts = ('backbone',) if part == 'encoder' else _parts_for(target, state)
    state, rows = _select(state, parts)
    if target == 'official':
        return _export_official(state, metadata, Path(out), path, rows, remarks)
    return _export_to_network(TARGETS[target], state, metadata, Path(out), path, rows, remarks)


def describe(
    state: dict[str, Tensor],
    path: Path,
    num_heads: int | None,
    img_size: int | tuple[int, int] | None,
    pooled: bool | None,
    remarks: list[str],
) -> dict[str, Any]:
    """Make the metadata of a file that has none; adds remarks on what is assumed.

    Raises:
        ValueError: If the file has no encoder, or its number of heads cannot be told.
    """
    try:
        width = state['backbone.cls_token'].shape[-1]
        patch = state['backbone.patch_embed.proj.weight']
        hidden = len(state['backbone.blocks.0.mlp.fc1.weight'])
    except KeyError as error:
        raise ValueError(
            f'{path} is no checkpoint of this project: it has no {error}. Weights of others are '
            'brought in with tools/convert_checkpoint.py'
        ) from error
    tables = [v for k, v in state.items() if k.endswith(TABLE)]
    published = {arch['embed_dims']: arch['num_heads'] for arch in ARCHS.values()}
    heads = tables[0].shape[1] if tables else num_heads or published.get(width)
    if heads is None:
        raise ValueError(f'{path} does not tell the number of heads: give --num-heads')
    if not tables and num_heads is None:
        remarks.append(f'{heads} heads assumed for width {width}: --num-heads')
    if img_size is None:
        remarks.append('pictures of 224x224 pixels assumed: --img-size')
    if pooled is None:
        pooled = bool(tables)
        how = 'the mean of the patch tokens' if pooled else 'each token'
        remarks.append(f'the final norm is assumed to be applied to {how}: --pool')
    size = list(to_pair(img_size or 224))
    encoder = {
        'embed_dims': width,
        'depth': count_blocks(state),
        'num_heads': heads,
        'mlp_ratio': hidden / width,
        'patch_size': patch.shape[-1],
        'in_channels': patch.shape[1],
        'img_size': size,
        'pretrain_img_size': size,
        'use_rel_pos_bias': bool(tables),
        'final_norm': 'backbone.norm.weight' in state,
        'pooled_norm': pooled,
    }
    metadata: dict[str, Any] = {'encoder': encoder}
    if 'neck.mask_token' in state:
        metadata['neck'] = {'embed_dims': state['neck.mask_token'].shape[-1]}
    return metadata


def _parts_for(target: str, state: dict[str, Tensor]) -> tuple[str, ...]:
    if target != 'official':
        return TARGETS[target].parts
    return ('backbone', 'neck') if 'neck.mask_token' in state else ('backbone', 'head')


def _select(
    state: dict[str, Tensor], parts: tuple[str, ...]
) -> tuple[dict[str, Tensor], list[Row]]:
    """Keep ``parts``, and make a row of the report for each other one."""
    kept = {k: v for k, v in state.items() if k.split('.')[0] in parts}
    left = [k.split('.')[0] for k in state if k not in kept]
    reason = 'not exported'
    return kept, [
        Row('(left out)', f'{name}.{{rest}}', left.count(name), reason)
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
    return out.with_name(stem + suffix)


def _to_theirs(
    state: dict[str, Tensor], rules: list[Rule], metadata: dict[str, Any], path: Path
) -> Translation:
    result = to_theirs(state, rules, fixed_tensors(metadata), metadata['encoder']['pooled_norm'])
    if result.unknown:
        raise ValueError(f'{path}: no rule knows {name_some(result.unknown)}')
    return result


def _export_to_network(
    target: Target,
    state: dict[str, Tensor],
    metadata: dict[str, Any],
    out: Path,
    path: Path,
    rows: list[Row],
    remarks: list[str],
) -> Export:
    """Fill the other project's network, compare features, write it."""
    sizes = metadata['encoder']
    if target.needs_norm and not sizes['final_norm']:
        raise ValueError(
            f'{path} has no final norm (it is of dense prediction), the network there always does'
        )
    classes = len(state['head.fc.weight']) if 'head.fc.weight' in state else 0
    network = target.build(sizes, classes).eval()
    result = _to_theirs(state, target.rules, metadata, path)
    theirs = network.state_dict()
    # the index of relative positions is stored by some versions only
    weights = {k: v for k, v in result.state.items() if k in theirs or not k.endswith(INDEX)}
    network.load_state_dict(weights)
    ours = build_encoder(sizes, out_type='avg_featmap' if sizes['pooled_norm'] else 'raw').eval()
    ours.load_state_dict(
        {k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith('backbone.')}
    )
    errors = compare_features(ours, network, target, sizes)
    network.float().load_state_dict(weights)  # undo the rounding of the comparison
    place = _name(out, path, state, target.suffix)
    place.parent.mkdir(parents=True, exist_ok=True)
    usage = target.write(network, place)
    return Export(place, result.rows + rows, remarks, errors, usage)


@torch.no_grad()
def compare_features(
    ours: nn.Module, theirs: nn.Module, target: Target, sizes: dict[str, Any]
) -> dict[torch.dtype, float]:
    """Compare both networks on a seeded random image, in float64 and float32.

    Returns:
        The largest difference over the largest feature, by precision.

    Raises:
        RuntimeError: If it is above ``TOLERANCES``.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, sizes['in_channels'], *sizes['img_size'])
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    errors = {}
    for dtype, tolerance in TOLERANCES.items():
        want = ours.to(dtype)(images.to(dtype))[0]
        have = target.features(theirs.to(dtype), images.to(dtype), sizes['pooled_norm'])
        errors[dtype] = ((have - want).abs().max() / want.abs().max()).item()
        if not errors[dtype] <= tolerance:
            raise RuntimeError(
                f'the exported network gives other features in {dtype}: they differ by '
                f'{errors[dtype]:.2g} of the largest, at most {tolerance:g} is rounding. Nothing '
                'was written; please report this with the versions that '
                '`python -m cae_mm.doctor` prints'
            )
    return errors


def _export_official(
    state: dict[str, Tensor],
    metadata: dict[str, Any],
    out: Path,
    path: Path,
    rows: list[Row],
    remarks: list[str],
) -> Export:
    """Write the official names, after checking that the way back gives the same weights."""
    sizes = metadata['encoder']
    finetuned = 'head.fc.weight' in state or sizes['pooled_norm']
    rules = OFFICIAL_FINETUNED if finetuned else OFFICIAL
    result = _to_theirs(state, rules, metadata, path)
    if 'neck.mask_token' not in state and not finetuned:
        result.state = {k: v for k, v in result.state.items() if k.startswith('encoder.')}
    back, *_ = translate(result.state, 'official', path, num_heads=sizes['num_heads'])
    if back.keys() != state.keys() or any(not torch.equal(back[k], state[k]) for k in state):
        raise RuntimeError(f'{path}: the way back from official names gives other weights')
    place = _name(out, path, state, '.pth')
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'model': result.state}, place)
    usage = f'--finetune {place}, --model_key model (official run_class_finetuning.py)'
    return Export(place, result.rows + rows, remarks, {}, usage)


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{package} is needed for this: pip install -c constraints/onedl.txt '.[export]' "
            '(constraints/openmmlab.txt with the upstream packages)'
        ) from error


def _mmpretrain_config(sizes: dict[str, Any]) -> dict[str, Any]:
    return dict(
        type='mmpretrain.BEiTViT',
        arch=dict(
            embed_dims=sizes['embed_dims'],
            num_layers=sizes['depth'],
            num_heads=sizes['num_heads'],
            feedforward_channels=int(sizes['embed_dims'] * sizes['mlp_ratio']),
        ),
        img_size=tuple(sizes['img_size']),
        patch_size=sizes['patch_size'],
        in_channels=sizes['in_channels'],
        norm_cfg=dict(type='LN', eps=1e-6),
        final_norm=sizes['final_norm'] and not sizes['pooled_norm'],
        out_type='avg_featmap' if sizes['pooled_norm'] else 'raw',
        use_abs_pos_emb=True,
        use_rel_pos_bias=sizes['use_rel_pos_bias'],
    )


def _build_mmpretrain(sizes: dict[str, Any], classes: int) -> nn.Module:
    importlib.import_module('mmpretrain.models')
    config = _mmpretrain_config(sizes)
    network: Any = nn.Module()
    network.config = config
    network.backbone = MODELS.build(config)
    if classes:
        network.head = nn.Module()
        network.head.fc = nn.Linear(sizes['embed_dims'], classes)
    return network


def _mmpretrain_features(network: Any, images: Tensor, pooled: bool) -> Tensor:
    return network.backbone(images)[0]


def _write_mmpretrain(network: Any, place: Path) -> str:
    torch.save({'state_dict': network.state_dict(), 'meta': {}}, place)
    init_cfg = dict(type='Pretrained', checkpoint=str(place), prefix='backbone.')
    return f'backbone={network.config | dict(init_cfg=init_cfg)}'


def _build_timm(sizes: dict[str, Any], classes: int) -> nn.Module:
    return _require('timm').create_model(
        'beit_base_patch16_224',  # the class is Beit; all of its sizes are given below
        pretrained=False,
        img_size=tuple(sizes['img_size']),
        patch_size=sizes['patch_size'],
        in_chans=sizes['in_channels'],
        embed_dim=sizes['embed_dims'],
        depth=sizes['depth'],
        num_heads=sizes['num_heads'],
        mlp_ratio=sizes['mlp_ratio'],
        init_values=0.1,
        use_abs_pos_emb=True,
        use_rel_pos_bias=sizes['use_rel_pos_bias'],
        global_pool='avg' if sizes['pooled_norm'] else 'token',
        num_classes=classes,
    )


def _timm_features(network: Any, images: Tensor, pooled: bool) -> Tensor:
    tokens = network.forward_features(images)
    return network.forward_head(tokens, pre_logits=True) if pooled else tokens


def _write_timm(network: Any, place: Path) -> str:
    models = importlib.import_module('timm.models')
    models.save_for_hf(network, place, safe_serialization=True)
    return f"timm.create_model('local-dir:{place}', pretrained=True)"


def _build_huggingface(sizes: dict[str, Any], classes: int) -> nn.Module:
    height, width = grid_from(sizes)
    if height != width:
        raise ValueError("Hugging Face's BeitModel takes square images only")
    transformers = _require('transformers')
    config = transformers.BeitConfig(
        hidden_size=sizes['embed_dims'],
        num_hidden_layers=sizes['depth'],
        num_attention_heads=sizes['num_heads'],
        intermediate_size=int(sizes['embed_dims'] * sizes['mlp_ratio']),
        image_size=sizes['img_size'][0],
        patch_size=sizes['patch_size'],
        num_channels=sizes['in_channels'],
        layer_norm_eps=1e-6,
        layer_scale_init_value=0.1,
        use_absolute_position_embeddings=True,
        use_relative_position_bias=sizes['use_rel_pos_bias'],
        use_mean_pooling=sizes['pooled_norm'],
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
