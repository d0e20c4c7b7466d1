"""The checkpoints that a config loads: whether they are there, fit, and were made alike."""

import ast
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.registry import MODELS
from torch import Tensor, nn

from cae_mm.checkpoints import files
from cae_mm.checkpoints.pretrained import (
    KeyMatch,
    check_share,
    compare_keys,
    explain_mismatch,
    fit_state_dict,
)
from cae_mm.doctor.case import Case, Finding, get
from cae_mm.doctor.failures import explain
from cae_mm.hooks.checkpoint import SafeLoadHook
from cae_mm.models import CAEDataPreprocessor, CAEViT, DALLEEncoder, DiscreteVAE
from cae_mm.models.vit import ARCHS
from cae_mm.patches import to_pair

COMMAND_LINE = 'CHECKPOINT'
IMG_SIZE = signature(CAEViT).parameters['img_size'].default
MAX_LAYER_SCALE_FACTOR = 10
MIN_MATCHED = signature(SafeLoadHook).parameters['min_matched'].default


class Load(NamedTuple):
    """Weights that a run is going to load."""

    key: str  # where the path stands
    path: str
    module: str  # part of the model that they are for, '' is all of it
    prefix: str


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        state: The weights.
        config: The config that they were made with, {} if the file does not carry it.
        metadata: What ``tools/convert_checkpoint.py`` wrote, {} for other files.
    """

    state: dict[str, Tensor]
    config: dict[str, Any]
    metadata: dict[str, Any]


def find_loads(case: Case) -> list[Load]:
    """Everything that is loaded into the model; the command line's file takes the config's place.

    It stands for the backbone's ``init_cfg`` unless it holds other parts of this model as well.
    """
    loads = []
    for key, node in case.typed:
        init = node.get('init_cfg')
        if key.partition('.')[0] == 'model' and get(init, 'type') == 'Pretrained':
            place, path = f'{key}.init_cfg.checkpoint', str(get(init, 'checkpoint'))
            loads.append(Load(place, path, key[len('model.') :], get(init, 'prefix') or ''))
    if case.get('load_from'):
        loads.append(Load('load_from', case.get('load_from'), '', ''))
    if case.checkpoint is None:
        return loads
    backbone = next((load for load in loads if load.module == 'backbone'), None)
    rest = [load for load in loads if load is not backbone]
    if backbone is None or _is_whole(case, case.checkpoint):
        return [*rest, Load(COMMAND_LINE, str(case.checkpoint), '', '')]
    return [*rest, backbone._replace(key=COMMAND_LINE, path=str(case.checkpoint))]


def _is_whole(case: Case, path: Path) -> bool:
    """Whether a file holds parts of this model other than its backbone."""
    checkpoint = read_checkpoint(path)
    if case.model is None or isinstance(checkpoint, Exception):
        return False
    return any(
        key in checkpoint.state
        for key in case.model.state_dict()
        if key.split('.')[0] != 'backbone'
    )


def read_checkpoint(path: str | Path) -> Checkpoint | Exception:
    """Read a file without executing anything in it, or return why it cannot be read."""
    path = Path(path).expanduser().absolute()
    if not path.is_file():
        return FileNotFoundError(f'{path} does not exist')
    return _read_checkpoint(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)  # several checks look at a file
def _read_checkpoint(path: Path, changed: int) -> Checkpoint | Exception:
    try:
        file = files.read_checkpoint(path)
        return Checkpoint(file.state, _read_config(file.content), file.metadata)
    except ValueError as error:
        return error


def _read_config(content: Any) -> dict[str, Any]:
    """The config that mmengine's Runner stores as text, {} if there is none."""
    text = get(content, 'meta.cfg')
    try:
        return parse_config(text) if isinstance(text, str) else {}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def parse_config(text: str) -> dict[str, Any]:
    """Read the assignments of a config's text without executing it.

    Args:
        text: As ``mmengine.Config.pretty_text`` writes it: ``name = literal or dict(...)``.

    Returns:
        The values by name; what is no literal stands as its text.

    Raises:
        SyntaxError: If it is no Python.
    """
    return {
        target.id: _literal(statement.value)
        for statement in ast.parse(text).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        pairs = [_literal(argument) for argument in node.args]
        named = {keyword.arg: _literal(keyword.value) for keyword in node.keywords if keyword.arg}
        return {k: v for pair in pairs if isinstance(pair, dict) for k, v in pair.items()} | named
    if isinstance(node, ast.Dict):
        items = zip(node.keys, node.values, strict=True)
        return {ast.literal_eval(key): _literal(value) for key, value in items if key}
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(item) for item in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def check_weights(case: Case) -> Iterator[Finding]:
    """Whether each checkpoint exists, can be read, and has the keys and shapes of the model."""
    for load in find_loads(case):
        module = _module(case, load)
        if '://' in load.path:
            if _is_strict(module):
                yield _found(case, load, 'error', 'files only, no URLs', 'download it first')
            continue
        checkpoint = read_checkpoint(load.path)
        if isinstance(checkpoint, FileNotFoundError):
            advice = getattr(module, 'explain_missing_weights', str)() or 'Give an existing file'
            yield _found(case, load, 'error', str(checkpoint), advice)
        elif isinstance(checkpoint, Exception):
            remedy = 'tools/convert_checkpoint.py --help tells which files can be converted'
            yield _found(case, load, 'error', explain(checkpoint), remedy)
        elif module is not None:
            misfits = list(_check_fit(case, load, module, checkpoint))
            yield from misfits or _check_heads(case, load, checkpoint)


def _module(case: Case, load: Load) -> nn.Module | None:
    try:
        return case.model and case.model.get_submodule(load.module)
    except AttributeError:  # a wrapper has it elsewhere
        return None


def _found(case: Case, load: Load, level: str, text: str, remedy: str) -> Finding:
    if load.key == COMMAND_LINE:
        return Finding(level, load.key, text, remedy, load.path)
    return case.found(level, load.key, text, remedy)


def _is_strict(module: nn.Module | None) -> bool:
    """Whether a module refuses what does not fit; where mmengine loads it only logs that."""
    return hasattr(module, 'explain_missing_weights')


def _check_fit(
    case: Case, load: Load, module: nn.Module, checkpoint: Checkpoint
) -> Iterator[Finding]:
    state = _without_prefix(checkpoint.state, load.prefix)
    try:
        adapted, _ = fit_state_dict(module, state)
    except (ValueError, KeyError, RuntimeError) as error:
        yield _found(case, load, 'error', explain(error), 'set arch and img_size as they were')
        return
    match = compare_keys(module.state_dict(), adapted)
    if not match.problems:
        return
    name = f'{Path(load.path).name} does not fit {type(module).__name__}: '
    hint = explain_mismatch(module.state_dict(), checkpoint.state, load.prefix)
    text = f'{name}{"; ".join(match.problems)}{hint}'
    yield _found(
        case,
        load,
        _level(case, load, module, match),
        text,
        _remedy(load, module, state, match),
    )


def _level(case: Case, load: Load, module: nn.Module, match: KeyMatch) -> str:
    """An error where the run will stop or hardly anything is loaded; a new head is no error."""
    if _is_strict(module) or load.key == COMMAND_LINE or case.get('resume'):
        return 'error'
    try:
        check_share(module, match, MIN_MATCHED, Path(load.path), {})
    except ValueError:
        return 'error'
    return 'note'


def _remedy(load: Load, module: nn.Module, state: dict[str, Tensor], match: KeyMatch) -> str:
    """The way out, as far as keys and shapes tell what the file is."""
    backbone = getattr(module, 'backbone', None)
    if load.module == '' and isinstance(backbone, CAEViT):
        encoder = {f'backbone.{key}' for key in backbone.state_dict()}
        if not match.matched and _describe(state):
            return (
                f'it is an encoder alone: leave out {load.key} and set '
                f"model.backbone.init_cfg=dict(type='Pretrained', checkpoint={load.path!r})"
            )
        if encoder <= set(match.matched):
            return (
                f'only its encoder fits: leave out {load.key} and set model.backbone.init_cfg=dict('
                f"type='Pretrained', checkpoint={load.path!r}, prefix='backbone.')"
            )
    made_for = _describe(state) or _describe(_without_prefix(state, 'backbone.'))
    if match.reshaped and made_for:
        return f'the file holds an encoder with {made_for}: set arch and patch_size accordingly'
    if not match.matched:
        return f'give weights of {type(module).__name__}, and init_cfg.prefix as their keys begin'
    return 'use the config that the file was made with'


def _describe(state: dict[str, Tensor]) -> str:
    """Name the arch of an encoder's weights, '' if they are none."""
    if 'cls_token' not in state or 'patch_embed.proj.weight' not in state:
        return ''
    width = state['cls_token'].shape[-1]
    depth = len({key.split('.')[1] for key in state if key.startswith('blocks.')})
    patch_size = state['patch_embed.proj.weight'].shape[-1]
    names = [
        repr(name)
        for name, arch in ARCHS.items()
        if (arch['embed_dims'], arch['depth']) == (width, depth)
    ]
    arch = names[0] if names else f'dict(embed_dims={width}, depth={depth}, ...)'
    return f'arch={arch}, patch_size={patch_size}'


def _without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _check_heads(case: Case, load: Load, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Compare the number of heads, which no shape tells."""
    if case.encoder is None or load.module not in ('', 'backbone'):
        return
    backbone = get(checkpoint.config, 'model.backbone', {})
    arch = backbone.get('arch', 'base') if backbone.get('type') == 'cae_mm.CAEViT' else None
    arch = ARCHS.get(arch) if isinstance(arch, str) else arch
    made_with = get(checkpoint.metadata, 'encoder.num_heads') or get(arch, 'num_heads')
    heads: Any = case.encoder.blocks[0].attn.num_heads  # type: ignore[union-attr]
    if made_with and made_with != heads:
        yield _found(
            case,
            load,
            'error',
            f'it was made with {made_with} heads, the model has {heads}: shapes are the same, '
            'results are not',
            f'set num_heads={made_with} in model.backbone.arch (a dict)',
        )


def find_encoder_load(case: Case) -> Load | None:
    """The last file with weights for our encoder."""
    loads = [load for load in find_loads(case) if load.module in ('', 'backbone')]
    return loads[-1] if case.encoder is not None and loads else None


def _open(load: Load | None) -> Checkpoint | None:
    """What is in the file, if that is an encoder; ``check_weights`` reports what else it is."""
    checkpoint = read_checkpoint(load.path) if load else None
    if load is None or not isinstance(checkpoint, Checkpoint):
        return None
    return checkpoint if f'{_encoder_prefix(load)}cls_token' in checkpoint.state else None


def _encoder_prefix(load: Load) -> str:
    return load.prefix if load.module else 'backbone.'


def check_layer_scale(case: Case) -> Iterator[Finding]:
    """Layer scales of a checkpoint that pretraining starts from, against the arch's.

    They grow in training, CAE-L's from 1e-5, but nothing makes them shrink.
    """
    load = find_encoder_load(case)
    checkpoint = _open(load)
    if load is None or checkpoint is None or not case.pretrains:
        return
    gamma = checkpoint.state.get(f'{_encoder_prefix(load)}blocks.0.gamma_1')
    if gamma is None:
        return
    arch = case.get('model.backbone.arch', 'base')
    have = ARCHS[arch]['layer_scale'] if isinstance(arch, str) else arch['layer_scale']
    found = gamma.float().abs().mean().item()
    if 1 / MAX_LAYER_SCALE_FACTOR <= found / have <= MAX_LAYER_SCALE_FACTOR:
        return
    yield _found(
        case,
        load,
        'warning' if found < have else 'note',
        f'layer scale is {found:.2g} on average in its first block, {have:g} in the arch: '
        + ('it was initialised otherwise' if found < have else 'it grew, or began otherwise'),
        f'check model.backbone.arch (layer_scale: S, B {ARCHS["base"]["layer_scale"]}, '
        f'L, H {ARCHS["large"]["layer_scale"]}); the weights of the file are what counts',
    )


def check_positions(case: Case) -> Iterator[Finding]:
    """Positions are resized from the size of pretraining, which the config has to name."""
    load = find_encoder_load(case)
    checkpoint = _open(load)
    if load is None or checkpoint is None or case.pretrains:
        return
    backbone = case.get('model.backbone')
    named = backbone.get('pretrain_img_size')
    have = to_pair(named or backbone.get('img_size', IMG_SIZE))
    size = _pretraining_size(checkpoint)
    if size is None:
        if named is None and have != to_pair(IMG_SIZE):
            yield case.found(
                'note',
                'model.backbone.img_size',
                f'{load.path} does not say its size of pretraining: positions are right if it is '
                'this',
                'else set model.backbone.pretrain_img_size',
            )
    elif size != have:
        yield case.found(
            'error',
            f'model.backbone.{"pretrain_img_size" if named else "img_size"}',
            f'{load.path} was pretrained at {size[0]}x{size[1]} pixels: its positions would be '
            'made anew for another grid instead of resized',
            f'set model.backbone.pretrain_img_size={size}',
        )


def _pretraining_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    backbone = get(checkpoint.config, 'model.backbone')
    if get(backbone, 'type') == 'cae_mm.CAEViT':
        return to_pair(backbone.get('pretrain_img_size') or backbone.get('img_size', IMG_SIZE))
    size = get(checkpoint.metadata, 'encoder.pretrain_img_size')
    return size and to_pair(tuple(size))


class Normalization(NamedTuple):
    """How a data preprocessor treats images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rgb: bool

    def __str__(self) -> str:
        mean, std = (', '.join(f'{value:g}' for value in values) for values in self[:2])
        return f'mean=[{mean}], std=[{std}], {"RGB" if self.rgb else "BGR"}'

    def fits(self, other: 'Normalization') -> bool:
        """Whether both are the same but for rounding."""
        return self.rgb == other.rgb and all(
            _close(mine, theirs) for mine, theirs in zip(self[:2], other[:2], strict=True)
        )


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=0.01) for x, y in pairs)


def read_normalization(model: Any, preprocessor: Any) -> Normalization:
    """Read it from the configs of a model and its data preprocessor, and its class' defaults.

    ``to_rgb`` of mmpretrain and ``bgr_to_rgb`` of mmseg and mmdet mean the same.
    """
    name = get(preprocessor, 'type')
    if name is None and get(model, 'type') in ('cae_mm.CAE', None):
        name = 'cae_mm.CAEDataPreprocessor'
    with MODELS.switch_scope_and_registry(None) as registry:
        cls = registry.get(name) if name else None
    parameters = signature(cls).parameters if cls else {}
    options = {k: p.default for k, p in parameters.items() if p.default is not Parameter.empty}
    options |= preprocessor or {}
    mean, std = options.get('mean') or (0.0,) * 3, options.get('std') or (1.0,) * 3
    rgb = options.get('to_rgb') or options.get('bgr_to_rgb') or False
    return Normalization(tuple(mean), tuple(std), bool(rgb))


def check_normalization(case: Case) -> Iterator[Finding]:
    """Images are to be normalised as they were in pretraining, by default as ImageNet's."""
    load = find_encoder_load(case)
    checkpoint = _open(load)
    config = checkpoint.config if checkpoint else {}
    if load is None or (case.pretrains and not config):
        return
    if any(str(node['type']).endswith('Normalize') for _, node in case.typed):
        return  # in the pipeline, before the data preprocessor
    key = 'model.data_preprocessor'
    if not case.get(key) and case.get('data_preprocessor'):
        key = 'data_preprocessor'
    theirs = get(config, 'model.data_preprocessor') or get(config, 'data_preprocessor')
    want = case.attempt(lambda: read_normalization(config.get('model'), theirs))
    have = case.attempt(lambda: read_normalization(case.get('model'), case.get(key)))
    if isinstance(want, Normalization) and isinstance(have, Normalization) and not have.fits(want):
        name = Path(load.path).name
        of = f'{name} was made with' if config else 'pretraining has by default (ImageNet)'
        yield case.found(
            'warning',
            key,
            f'images are normalised by {have}; {of} {want}',
            f'set {key} as in pretraining',
        )


def check_second_view(case: Case) -> Iterator[Finding]:
    """The second view is to be in the range that the tokenizer was trained on."""
    preprocessor = case.get('model.data_preprocessor') or {}
    target = getattr(case.model, 'target_generator', None)
    if preprocessor.get('type', 'cae_mm.CAEDataPreprocessor') != 'cae_mm.CAEDataPreprocessor':
        return
    defaults = {k: p.default for k, p in signature(CAEDataPreprocessor).parameters.items()}
    names = ('second_mean', 'second_std')
    have = [preprocessor.get(name, defaults[name]) for name in names]
    if isinstance(target, DALLEEncoder):
        want, meaning = [defaults[name] for name in names], '0.8 x + 0.1 with x in [0, 1]'
    elif isinstance(target, DiscreteVAE):
        want, meaning = [(127.5,) * 3] * 2, 'images in [-1, 1]'
    else:
        return
    for name, mine, theirs in zip(names, have, want, strict=True):
        if not _close(mine, theirs):
            yield case.found(
                'warning',
                f'model.data_preprocessor.{name}',
                f'{type(target).__name__} was trained on {meaning}; {name} is {tuple(mine)}',
                f'set model.data_preprocessor.{name}={theirs}',
            )
