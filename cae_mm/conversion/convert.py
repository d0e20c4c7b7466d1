"""Bring weights of other projects in: read, translate by rules, check, write."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cae_mm.checkpoints import EncoderDescription, read_checkpoint
from cae_mm.checkpoints.files import write_safetensors
from cae_mm.checkpoints.pretrained import compare_keys, guess_source, name_some, strip_prefix
from cae_mm.checkpoints.unpickler import refusing
from cae_mm.conversion.paddle import SUFFIXES, read_paddle
from cae_mm.conversion.rules import LeaveOut, Move, Rule, Translation, to_ours
from cae_mm.conversion.sizes import (
    DECODER_HEADS,
    describe_weights,
    find_sizes,
    fixed_tensors,
    position_tolerance,
    read_neck_sizes,
)
from cae_mm.conversion.sources import SOURCES, table_for
from cae_mm.models import CAENeck, build_encoder
from cae_mm.patches import grid_of

PARTS = ('encoder', 'full')


@dataclass
class Conversion:
    """What came out."""

    state: dict[str, Tensor]  # under our names, the encoder under 'backbone.'
    source: str  # the project that it comes from
    description: EncoderDescription
    neck: dict[str, Any] | None  # arguments of CAENeck, None without regressor and decoder
    counts: dict[Rule, int]  # keys that became what each rule says
    remarks: list[str]  # what was assumed or added
    path: Path | None = None  # the file written

    @property
    def metadata(self) -> dict[str, Any]:
        """What is written beside the weights."""
        sizes = {'encoder': self.description.to_dict()} | ({'neck': self.neck} if self.neck else {})
        return {'source': self.source, 'part': part_of(self.state)} | sizes


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
    if Path(out).suffix not in ('', '.safetensors'):
        raise ValueError(f'{out}: weights are written as .safetensors, name it so')
    state, hints = _read_foreign(path)
    try:
        result = translate(
            state,
            source or hints.get('source'),
            part=part,
            num_heads=num_heads or hints.get('num_heads'),
            decoder_heads=decoder_heads,
        )
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'{path} cannot be converted: {error}') from error
    result.path = name_output(out, path, result.state, '.safetensors')
    write_safetensors(result.path, result.state, result.metadata)
    return result


def _read_foreign(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a file or folder, and what is known beside them: source, heads."""
    if path.suffix in SUFFIXES and path.is_file():
        return read_paddle(path), {'source': 'passl'}
    if path.is_file():
        return read_checkpoint(path).state, {}
    weights, config = path / 'model.safetensors', path / 'config.json'
    if not (weights.is_file() and config.is_file()):
        raise FileNotFoundError(
            f'no checkpoint at {path.absolute()}: give a file, or a folder with config.json and '
            'model.safetensors'
        )
    with refusing(config):
        content = dict(json.loads(config.read_bytes()))
    if 'architecture' in content:
        heads = content.get('model_args', {}).get('num_heads')
        return read_checkpoint(weights).state, {'source': 'timm', 'num_heads': heads}
    ours = {'model_type': 'beit', 'layer_norm_eps': 1e-6, 'hidden_act': 'gelu'}
    other = {k: content.get(k) for k, v in ours.items() if content.get(k) != v}
    if other:
        raise ValueError(f'{config} has {other}, a CAEViT has {ours}: their features would differ')
    heads = content.get('num_attention_heads')
    return read_checkpoint(weights).state, {'source': 'huggingface', 'num_heads': heads}


def translate(
    state: dict[str, Tensor],
    source: str | None,
    *,
    part: str | None = None,
    num_heads: int | None = None,
    decoder_heads: int | None = None,
) -> Conversion:
    """Do what ``convert_checkpoint`` does with a state dict; nothing is written."""
    if part not in (None, *PARTS):
        raise ValueError(f"Unknown part '{part}': choose one of {PARTS}")
    source = source or guess_source(state)
    if source is None:
        raise ValueError(
            f'it is of no known source ({", ".join(SOURCES)}); its keys begin with '
            f'{", ".join(list(state)[:3])}. Weights of this project need no conversion'
        )
    rules = table_for(source, state)
    if part == 'encoder':
        rules = [
            LeaveOut(rule.foreign, note='part=encoder')
            if rule.ours.startswith(('neck', 'head.'))
            else rule
            for rule in rules
        ]
    translated = to_ours(state, rules)
    ours = translated.state
    if part == 'full' and part_of(ours) == 'encoder':
        raise ValueError("it holds an encoder only: leave out part='full'")
    pooled = any(rule.pooled for rule in translated.counts)
    description, remarks = describe_weights(
        ours, source=source, num_heads=num_heads, pooled_norm=pooled
    )
    img_size, pretrain_img_size = find_sizes(translated.checks, description.patch_size)
    description = replace(description, img_size=img_size, pretrain_img_size=pretrain_img_size)
    heads = decoder_heads or DECODER_HEADS.get(source, description.num_heads)
    neck = read_neck_sizes(ours, description.embed_dims, heads)
    if neck and not decoder_heads:
        remarks.append(
            f'{heads} heads of regressor and decoder assumed: the file does not tell, '
            '--decoder-heads does'
        )
    remarks += _complete(ours, description)
    taken = [rule for rule in rules if rule.pooled in (None, pooled)]
    _check_fit(ours, description, neck, taken)
    _check_duplicates(translated, description)
    return Conversion(ours, source, description, neck, translated.counts, remarks)


def _complete(state: dict[str, Tensor], d: EncoderDescription) -> list[str]:
    """Write what may be left out because it changes nothing, and say so."""
    remarks = []
    neutral = {'gamma_1': 1.0, 'gamma_2': 1.0, 'attn.q_bias': 0.0, 'attn.v_bias': 0.0}
    for name, value in neutral.items():
        keys = [f'backbone.blocks.{i}.{name}' for i in range(d.depth)]
        if state.keys().isdisjoint(keys):
            state |= {key: torch.full((d.embed_dims,), value) for key in keys}
            remarks.append(f'no {name} in the file: {value:g} in all blocks, which is the same')
    return remarks


def _check_fit(
    state: dict[str, Tensor],
    description: EncoderDescription,
    neck: dict[str, Any] | None,
    rules: list[Rule],
) -> None:
    """Compare keys and shapes with those of our modules."""
    head = [len(v) for k, v in state.items() if k.startswith('head.fc.')]
    with torch.device('meta'):  # no memory for weights
        modules: dict[str, nn.Module] = {'backbone.': build_encoder(description)}
        if neck:
            modules['neck.'] = CAENeck(**neck)
        if head:
            modules['head.fc.'] = nn.Linear(description.embed_dims, head[0])
    for prefix, module in modules.items():
        match = compare_keys(module.state_dict(), strip_prefix(state, prefix))
        missing = [_name_foreign(prefix + key, rules) for key in match.missing]
        named = f' (in the file: {name_some(missing)})' if missing else ''
        if match.problems:
            raise ValueError(f'it does not fit {type(module).__name__}: {match.explanation}{named}')


def _name_foreign(key: str, rules: list[Rule]) -> str:
    names = (rule.foreign_keys(key) for rule in rules if isinstance(rule, Move))
    return next((' + '.join(some) for some in names if some), key)


def _check_duplicates(translated: Translation, description: EncoderDescription) -> None:
    """Compare what the file has twice, or has and we compute."""
    computed = fixed_tensors(description, translated.state)
    for key, (ours, tensor) in translated.checks.items():
        expected = translated.state.get(ours, computed.get(ours))
        if expected is None:
            raise ValueError(f'{key} without the relative position tables it belongs to')
        same_shape = tensor.shape == expected.shape
        error = (tensor - expected).abs().max().item() if same_shape else math.inf
        if error <= (position_tolerance(tensor) if ours.endswith('positions') else 0):
            continue
        if ours in translated.state:
            by = error if same_shape else 'its shape'
            raise ValueError(f'{key} must be the same as {ours}, but differs by {by}')
        name, grid = ours.split('.')[-1], grid_of(description.img_size, description.patch_size)
        raise ValueError(f'{key} is not the {name} that we compute for {grid[0]}x{grid[1]} patches')


def part_of(state: dict[str, Tensor]) -> str:
    """Return 'encoder' if nothing else is in it, 'full' otherwise."""
    return 'encoder' if all(key.startswith('backbone.') for key in state) else 'full'


def name_output(out: str | Path, source: Path, state: dict[str, Tensor], suffix: str) -> Path:
    """Name what is written after ``out`` or, if that is a folder, after the file that was read."""
    out, ending = Path(out).expanduser(), f'_{part_of(state)}'
    if suffix and out.is_dir():
        out = out / source.stem
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.with_name(out.name.removesuffix(suffix).removesuffix(ending) + ending + suffix)
