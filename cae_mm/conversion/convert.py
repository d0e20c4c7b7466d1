"""Bring weights of other projects in: translate, check, complete, describe."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cae_mm.checkpoints.files import read_state_dict, write_safetensors
from cae_mm.checkpoints.pretrained import compare_keys, guess_source, name_some
from cae_mm.conversion.paddle import SUFFIXES, read_paddle
from cae_mm.conversion.rules import Move, Row, Rule, Translation, count_blocks, match_key, to_ours
from cae_mm.conversion.sources import INDEX, SOURCES, TABLE, table_for
from cae_mm.models.neck import CAENeck
from cae_mm.models.positions import SinCosPositions, relative_position_index
from cae_mm.models.vit import CAEViT
from cae_mm.patches import Grid

PARTS = ('encoder', 'full')
# Heads by width, where nothing in a file tells them. The official models (and PASSL's, which
# follow them) have 12 heads up to width 768, those of timm and the like 64 values per head.
OFFICIAL_HEADS = {192: 12, 384: 12, 768: 12, 1024: 16, 1280: 16}
USUAL_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
HEADS = dict.fromkeys(SOURCES, USUAL_HEADS) | dict.fromkeys(('official', 'passl'), OFFICIAL_HEADS)
# official fine-tuning without relative position bias looks as timm's: assume what both agree on
HEADS['timm'] = {D: n for D, n in USUAL_HEADS.items() if OFFICIAL_HEADS[D] == n}
# the option for the decoder's heads never reaches the official model, which has 12 at any width
OFFICIAL_DECODER_HEADS = 12
PRETRAIN_GRID = (14, 14)  # of all published weights: 224 px, patches of 16


@dataclass
class Conversion:
    """What came out.

    Attributes:
        state: Weights under our names, the encoder under ``backbone.``.
        metadata: What is written beside them: 'source', 'part', 'encoder' and 'neck' sizes.
        rows: What became of each key.
        remarks: What was assumed or added.
        path: The file written.
    """

    state: dict[str, Tensor]
    metadata: dict[str, Any]
    rows: list[Row]
    remarks: list[str]
    path: Path


def convert_checkpoint(
    source_path: str | Path,
    out: str | Path,
    *,
    source: str | None = None,
    part: str | None = None,
    num_heads: int | None = None,
    decoder_heads: int | None = None,
) -> Conversion:
    """Turn another project's checkpoint into a safetensors file with our names.

    Args:
        source_path: A ``.pth``, ``.safetensors``, ``.pd`` or ``.pdparams`` file, or a folder with
            config.json and model.safetensors (Hugging Face, timm).
        out: File or folder to write; the file's name gets '_encoder' or '_full'.
        source: 'official', 'mmpretrain', 'passl', 'timm' or 'huggingface'; guessed if None.
        part: 'encoder' leaves regressor, decoder and classifier out; 'full' keeps what there is of
            them, which is the default.
        num_heads: Heads of the encoder; by default what the file tells, or the published number.
        decoder_heads: Heads of regressor and decoder, likewise.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If anything in the file is unknown, missing, of a wrong shape, or cannot be
            expressed by a ``CAEViT``.
    """
    path = Path(source_path).expanduser()
    state, config = read_foreign(path)
    source = _resolve_source(source, state, config, path)
    state, metadata, rows, remarks = translate(
        state, source, path, part, num_heads or config.get('num_heads'), decoder_heads
    )
    target = name_output(out, path, metadata['part'])
    write_safetensors(target, state, metadata)
    return Conversion(state, metadata, rows, remarks, target)


def translate(
    state: dict[str, Tensor],
    source: str,
    path: Path,
    part: str | None = None,
    num_heads: int | None = None,
    decoder_heads: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any], list[Row], list[str]]:
    """Translate a state dict and check it against our models.

    Returns:
        The weights under our names, the metadata, the report's rows and remarks.

    Raises:
        ValueError: See ``convert_checkpoint``.
    """
    rules = table_for(source, state)
    found = to_ours(state, rules)
    _check_known(found, path)
    remarks = _complete(found, rules, path)
    encoder = read_encoder_sizes(found, source, num_heads, path, remarks)
    metadata: dict[str, Any] = {'source': source, 'encoder': encoder}
    metadata['part'] = part = _resolve_part(part, found.state)
    if part == 'encoder':
        _leave_out_rest(found)
    elif any(key.startswith('neck.') for key in found.state):
        metadata['neck'] = read_neck_sizes(
            found.state, source, decoder_heads, encoder, path, remarks
        )
    _check_fitting(found, metadata, rules, path)
    _check_same(found, path)
    _check_fixed(found, metadata, path)
    return found.state, metadata, found.rows, remarks


def read_foreign(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a file or folder, and what a folder's config.json says.

    Raises:
        FileNotFoundError: If it is neither.
        ValueError: If it needs code to be run, or holds something else.
    """
    if path.suffix in SUFFIXES and path.is_file():
        return read_paddle(path), {'source': 'passl'}
    if path.is_file():
        return read_state_dict(path), {}
    weights, config = path / 'model.safetensors', path / 'config.json'
    if not (weights.is_file() and config.is_file()):
        raise FileNotFoundError(
            f'no checkpoint at {path.absolute()}: give a file, or a folder with config.json and '
            'model.safetensors'
        )
    return read_state_dict(weights), _read_config(config)


def _read_config(path: Path) -> dict[str, Any]:
    """Take from a folder's config.json what shapes do not tell."""
    config = json.loads(path.read_text())
    if 'architecture' in config:
        return {'source': 'timm', 'num_heads': config.get('model_args', {}).get('num_heads')}
    ours = {'model_type': 'beit', 'layer_norm_eps': 1e-6, 'hidden_act': 'gelu'}
    other = {k: config.get(k) for k, v in ours.items() if config.get(k) != v}
    if other:
        raise ValueError(f'{path} has {other}, a CAEViT has {ours}: their features would differ')
    return {'source': 'huggingface', 'num_heads': config['num_attention_heads']}


def _resolve_source(
    source: str | None, state: dict[str, Tensor], config: dict[str, Any], path: Path
) -> str:
    if source is None:
        source = config.get('source') or guess_source(state)
        if source is None:
            first = ', '.join(list(state)[:3])
            raise ValueError(
                f'{path} is of no known source ({", ".join(SOURCES)}); its keys begin with {first}.'
                ' Weights of this project need no conversion'
            )
    if source not in SOURCES:
        raise ValueError(f"Unknown source '{source}': choose one of {SOURCES}")
    return source


def _resolve_part(part: str | None, state: dict[str, Tensor]) -> str:
    rest = any(not key.startswith('backbone.') for key in state)
    if part is None:
        return 'full' if rest else 'encoder'
    if part not in PARTS:
        raise ValueError(f"Unknown part '{part}': choose one of {PARTS}")
    if part == 'full' and not rest:
        raise ValueError("the file holds an encoder only: leave out part='full'")
    return part


def _leave_out_rest(found: Translation) -> None:
    """Drop what is not of the encoder, and say so in the report."""
    found.state = {k: v for k, v in found.state.items() if k.startswith('backbone.')}
    found.fixed = {k: v for k, v in found.fixed.items() if v[0] != 'neck_positions'}
    found.rows = [
        row
        if row.ours.removeprefix('= ').startswith(('backbone.', '('))
        else Row(row.theirs, '(left out)', row.count, 'part=encoder')
        for row in found.rows
    ]


def name_output(out: str | Path, source: Path, part: str) -> Path:
    """Return the file to write: named after ``out``, or after the source if that is a folder."""
    out = Path(out).expanduser()
    if out.suffix not in ('', '.safetensors'):
        raise ValueError(f'{out}: weights are written as .safetensors, name it so')
    folder = out.is_dir()
    stem = source.stem if folder else out.name.removesuffix('.safetensors')
    if not stem.endswith(f'_{part}'):
        stem += f'_{part}'
    return (out if folder else out.parent) / f'{stem}.safetensors'


def _check_known(found: Translation, path: Path) -> None:
    problems = []
    if found.unknown:
        problems.append(f'no rule knows {name_some(found.unknown)}')
    if found.incomplete:
        problems.append(f'{name_some(found.incomplete)} is missing')
    if problems:
        raise ValueError(f'{path} cannot be converted: {"; ".join(problems)}')


def _complete(found: Translation, rules: list[Rule], path: Path) -> list[str]:
    """Write shared tables to each block, and what is left out where it changes nothing."""
    state, remarks = found.state, []
    if 'backbone.cls_token' not in state:
        raise ValueError(f'{path} has no class token, which a CAEViT needs')
    width = state['backbone.cls_token'].shape[-1]
    blocks = range(count_blocks(state))
    shared = state.pop(f'backbone.blocks.{{i}}.attn.{TABLE}', None)
    if shared is not None:
        state |= {f'backbone.blocks.{i}.attn.{TABLE}': shared.clone() for i in blocks}
    neutral = {'gamma_1': 1.0, 'gamma_2': 1.0, 'attn.q_bias': 0.0, 'attn.v_bias': 0.0}
    for name, value in neutral.items():
        if not any(key.startswith('backbone.') and key.endswith(f'.{name}') for key in state):
            state |= {f'backbone.blocks.{i}.{name}': torch.full((width,), value) for i in blocks}
            remarks.append(f'no {name} in the file: {value:g} in all blocks, which is the same')
    return remarks


def read_encoder_sizes(
    found: Translation, source: str, num_heads: int | None, path: Path, remarks: list[str]
) -> dict[str, Any]:
    """Read widths, depth, grid and heads from shapes and positions; adds remarks on guesses.

    Raises:
        ValueError: If the positions are not our fixed ones, or the heads cannot be told.
    """
    state = found.state
    tables = {v for k, v in state.items() if k.endswith(TABLE)}
    heads_in_file = {table.shape[1] for table in tables}
    width = state['backbone.cls_token'].shape[-1]
    try:
        patch = state['backbone.patch_embed.proj.weight']
        hidden = len(state['backbone.blocks.0.mlp.fc1.weight'])
    except KeyError as error:
        raise ValueError(f'{path} cannot be converted: nothing in it is {error}') from error
    grid, pretrain_grid = _read_grids(found, path)
    heads = _resolve_heads(heads_in_file, num_heads, HEADS[source], width, path, remarks)
    return {
        'embed_dims': width,
        'depth': count_blocks(state),
        'num_heads': heads,
        'mlp_ratio': hidden / width,
        'patch_size': patch.shape[-1],
        'in_channels': patch.shape[1],
        'img_size': [side * patch.shape[-1] for side in grid],
        'pretrain_img_size': [side * patch.shape[-1] for side in pretrain_grid],
        'use_rel_pos_bias': bool(tables),
        'final_norm': found.pooled is not None,
        'pooled_norm': bool(found.pooled),
    }


def _resolve_heads(
    in_file: set[int],
    given: int | None,
    published: dict[int, int],
    width: int,
    path: Path,
    remarks: list[str],
) -> int:
    if len(in_file) == 1:
        (heads,) = in_file
        if given not in (None, heads):
            raise ValueError(f'{path} has relative position tables of {heads} heads, not {given}')
        return heads
    if given is not None:
        return given
    if width not in published:
        raise ValueError(
            f'{path} does not tell the number of heads, and width {width} is none that was '
            'published: give --num-heads'
        )
    remarks.append(
        f'{published[width]} heads assumed, as published for width {width}: the file does not '
        'tell, --num-heads does'
    )
    return published[width]


def _read_grids(found: Translation, path: Path) -> tuple[Grid, Grid]:
    """Find the grids whose sin-cos table (resized from another grid or not) the file has.

    Raises:
        ValueError: If it has none, or another table.
    """
    tables = [tensor for what, tensor in found.fixed.values() if what == 'positions']
    if not tables:
        raise ValueError(
            f'{path} has no absolute positions, as BEiT; a CAEViT always adds its sin-cos table, '
            'which would change all features'
        )
    table = tables[0].float()
    N, D = table.shape[-2] - 1, table.shape[-1]
    grids = [(h, N // h) for h in range(1, N + 1) if N % h == 0]
    tolerance = position_tolerance(tables[0])
    nearest = float('inf')
    for base in (None, PRETRAIN_GRID):
        for grid in grids:
            expected = SinCosPositions(D, base_grid=base)(grid, torch.device('cpu'))
            expected = nn.functional.pad(expected, (0, 0, 1, 0))  # [1+N, D], class token's is 0
            error = (expected - table.reshape(-1, D)).abs().max().item()
            nearest = min(nearest, error)
            if error <= tolerance:
                return grid, base or grid
    raise ValueError(
        f'{path} has positions that are not the sin-cos table of CAE (the nearest is off by '
        f'{nearest:.2g}): they were learned or made otherwise, and a CAEViT has no learned ones'
    )


def read_neck_sizes(
    state: dict[str, Tensor],
    source: str,
    decoder_heads: int | None,
    encoder: dict[str, Any],
    path: Path,
    remarks: list[str],
) -> dict[str, Any]:
    """Read the sizes of regressor and decoder from shapes; adds a remark on guessed heads."""
    try:
        width = state['neck.mask_token'].shape[-1]
        hidden = len(state['neck.regressor.0.mlp.fc1.weight'])
        out_dims = len(state['neck.output.weight'])
    except KeyError as error:
        raise ValueError(f'{path} cannot be converted: nothing in it is {error}') from error
    heads = decoder_heads
    if heads is None:
        published = source in ('official', 'passl')
        heads = OFFICIAL_DECODER_HEADS if published else encoder['num_heads']
        remarks.append(
            f'{heads} heads of regressor and decoder assumed: the file does not tell, '
            '--decoder-heads does'
        )
    if width % heads:
        raise ValueError(f'{path}: {heads} heads do not divide width {width}: --decoder-heads')
    return {
        'in_dims': encoder['embed_dims'],
        'embed_dims': width,
        'num_heads': heads,
        'regressor_depth': count_blocks(state, 'neck.regressor.'),
        'decoder_depth': count_blocks(state, 'neck.decoder.'),
        'out_dims': out_dims,
        'mlp_ratio': hidden / width,
    }


def build_encoder(sizes: dict[str, Any], **options: Any) -> CAEViT:
    """Build the ``CAEViT`` that the metadata of a converted file describe."""
    arch = {key: sizes[key] for key in ('embed_dims', 'depth', 'num_heads')}
    return CAEViT(
        arch=arch | {'layer_scale': 0.1},
        img_size=tuple(sizes['img_size']),
        pretrain_img_size=tuple(sizes['pretrain_img_size']),
        **{
            key: sizes[key]
            for key in ('patch_size', 'in_channels', 'mlp_ratio', 'use_rel_pos_bias', 'final_norm')
        },
        **options,
    )


def grid_from(sizes: dict[str, Any], key: str = 'img_size') -> Grid:
    """Rows and columns of patches in the metadata's ``img_size`` or ``pretrain_img_size``."""
    height, width = sizes[key]
    return height // sizes['patch_size'], width // sizes['patch_size']


def fixed_tensors(metadata: dict[str, Any]) -> dict[str, Tensor]:
    """Compute the tensors that others store and we do not, by the names of ``Fixed`` rules.

    Returns:
        'positions' with shape (1, 1 + N, D), the class token's position being zero; as far as the
        metadata tell their sizes, 'neck_positions' likewise, and 'relative_position_index' with
        shape (1 + N, 1 + N).
    """
    cpu = torch.device('cpu')
    encoder = metadata['encoder']
    grid = grid_from(encoder)
    base = grid_from(encoder, 'pretrain_img_size')
    table = SinCosPositions(encoder['embed_dims'], base_grid=base)(grid, cpu)
    tensors = {'positions': nn.functional.pad(table, (0, 0, 1, 0))[None]}
    if encoder['use_rel_pos_bias']:
        tensors[INDEX] = relative_position_index(grid, cpu)
    if 'neck' in metadata:
        table = SinCosPositions(metadata['neck']['embed_dims'])(grid, cpu)
        tensors['neck_positions'] = nn.functional.pad(table, (0, 0, 1, 0))[None]
    return tensors


def _check_fitting(
    found: Translation, metadata: dict[str, Any], rules: list[Rule], path: Path
) -> None:
    """Compare keys and shapes with those of our modules."""
    encoder = metadata['encoder']
    head = [len(v) for k, v in found.state.items() if k.startswith('head.fc.')]
    with torch.device('meta'):  # no memory for weights
        modules: dict[str, nn.Module] = {'backbone.': build_encoder(encoder)}
        if 'neck' in metadata:
            modules['neck.'] = CAENeck(**metadata['neck'])
        if head:
            modules['head.fc.'] = nn.Linear(encoder['embed_dims'], head[0])
    for prefix, module in modules.items():
        state = {k.removeprefix(prefix): v for k, v in found.state.items() if k.startswith(prefix)}
        match = compare_keys(module.state_dict(), state)
        if match.problems:
            missing = [name_theirs(prefix + key, rules) for key in match.missing]
            named = f' (in the file: {name_some(missing)})' if missing else ''
            raise ValueError(
                f'{path} does not fit {type(module).__name__}: {"; ".join(match.problems)}{named}'
            )


def name_theirs(key: str, rules: list[Rule]) -> str:
    """Return the other project's name for a key of ours."""
    for rule in rules:
        values = match_key(rule.ours, key) if isinstance(rule, Move) else None
        if values is not None and isinstance(rule, Move):
            return ' + '.join(template.format(**values) for template in rule.theirs)
    return key


def _check_same(found: Translation, path: Path) -> None:
    for key, (ours, tensor) in found.same.items():
        want = found.state[ours]
        if not torch.equal(tensor, want):
            by = (tensor - want).abs().max().item() if tensor.shape == want.shape else 'its shape'
            raise ValueError(f'{path}: {key} must be the same as {ours}, but differs by {by}')


def _check_fixed(found: Translation, metadata: dict[str, Any], path: Path) -> None:
    """Compare what we compute with what the file has."""
    expected = fixed_tensors(metadata)
    for key, (what, tensor) in found.fixed.items():
        want = expected.get(what)
        if want is None:
            raise ValueError(f'{path}: {key} without the relative position tables it belongs to')
        tolerance = position_tolerance(tensor) if want.is_floating_point() else 0
        if tensor.shape != want.shape or (tensor.to(want) - want).abs().max() > tolerance:
            grid = grid_from(metadata['encoder'])
            raise ValueError(
                f'{path}: {key} is not the {what} that we compute for {grid[0]}x{grid[1]} patches'
            )


def position_tolerance(table: Tensor) -> float:
    """Return how far a stored table of positions may be off: rounding of its type, of resizing."""
    return max(1e-5, 4 * torch.finfo(table.dtype).eps)
