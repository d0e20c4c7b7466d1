"""Load weights into a module: what does not fit is said, and no pickle is executed.

mmengine's own ``Pretrained`` initialiser loads with ``strict=False`` and falls back to executing
the pickle; a ``PretrainedModule`` loads through this file instead.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from cae_mm.checkpoints.files import Checkpoint, read_checkpoint

MAX_KEYS_SHOWN = 5
# Keys by which the weights of other projects are known; the first that is there counts.
HALLMARKS = {
    'embeddings.cls_token': 'huggingface',
    'beit.embeddings.cls_token': 'huggingface',
    'backbone.patch_embed.projection.weight': 'mmpretrain',
    'patch_embed.projection.weight': 'mmpretrain',
    'regressor_and_decoder.norm.weight': 'passl',
    'encoder.cls_token': 'official',
    'backbone.pos_embed': 'official',
    'blocks.0.attn.relative_position_index': 'official',
    'pos_embed': 'timm',
}


class PretrainedModule(BaseModule):
    """Load ``init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...)`` strictly.

    A subclass gives ``init_default_weights`` for the case without ``init_cfg``.
    """

    def init_weights(self) -> None:
        """Load the pretrained weights if ``init_cfg`` names some, else initialise."""
        if not self.init_cfg:
            self.init_default_weights()
            return
        options = dict(self.init_cfg)
        if options.pop('type', None) != 'Pretrained' or options.keys() - {'checkpoint', 'prefix'}:
            raise ValueError(
                f'{type(self).__name__} takes init_cfg=dict(type="Pretrained", checkpoint=..., '
                f'prefix=...) only, not {self.init_cfg}'
            )
        load_pretrained(self, **options)

    def init_default_weights(self) -> None:
        """Initialise without a checkpoint; the default keeps what the constructor made."""

    def explain_missing_weights(self) -> str:
        """Say how to come by weights for this module."""
        return 'Give the path of an existing checkpoint'


def load_pretrained(
    module: nn.Module, checkpoint: str | Path, prefix: str = '', *, min_matched: float = 1.0
) -> 'KeyMatch':
    """Load the keys of a checkpoint that start with ``prefix`` into ``module``.

    Where the module, or its ``backbone``, is a ``CAEViT``, its ``adapt_state_dict`` first makes
    relative position tables and the final norm fit. What was done is logged.

    Args:
        module: Where to load.
        checkpoint: A ``.safetensors`` file or a ``.pth`` of mmengine or torch.
        prefix: For example 'backbone.' for the encoder of a pretraining checkpoint.
        min_matched: 1 means that file and module must have exactly the same keys and shapes. With
            less the rest of the module stays as it is, as for a classifier with a new head; but
            this share of the backbone's tensors and of its elements (of the whole module's, if it
            has no backbone) must be loaded.

    Returns:
        Which keys were loaded and which were not.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a URL, or the file holds anything but plain data, or too few keys and
            shapes fit, or the file was made for another number of heads.
    """
    advice = getattr(module, 'explain_missing_weights', lambda: '')()
    path = find_file(checkpoint, type(module).__name__, advice)
    match = match_weights(module, read_checkpoint(path), prefix)
    if min_matched < 1:
        check_share(module, match, min_matched, path)
    elif match.problems:
        raise ValueError(f'{path} does not fit {type(module).__name__}: {match.explanation}')
    module.load_state_dict(match.matched, strict=min_matched == 1)
    log_match(module, match, path)
    return match


def find_file(checkpoint: str | Path, name: str, advice: str = '') -> Path:
    """Return the path of an existing file, with ``~`` replaced; ``name`` is what wants it."""
    if '://' in str(checkpoint):
        raise ValueError(f'{name} loads files only: download {checkpoint} first')
    path = Path(checkpoint).expanduser().absolute()
    if not path.is_file():
        raise FileNotFoundError(f'no weights for {name} at {path}. {advice}'.removesuffix('. '))
    return path


@dataclass(frozen=True)
class KeyMatch:
    """Which keys of a module a file fills."""

    matched: dict[str, Tensor]  # whose shape is the same in both, to be loaded
    missing: list[str]  # keys of the module that the file has not
    unexpected: list[str]  # keys of the file that the module has not
    reshaped: dict[str, str]  # key -> both shapes, where they differ
    remarks: Sequence[str] = ()  # what was changed to make the weights fit
    cause: str = ''  # the likely one of a mismatch

    @property
    def problems(self) -> list[str]:
        """One line each about missing, unexpected and reshaped keys, if there are some."""
        kinds = {'missing': self.missing, 'unexpected': self.unexpected}
        kinds['of another shape'] = list(self.reshaped.values())
        return [
            f'{len(keys)} keys {what}: {name_some(keys)}' for what, keys in kinds.items() if keys
        ]

    @property
    def explanation(self) -> str:
        """All problems and their cause, for a message."""
        return '; '.join(self.problems) + self.cause


def compare_keys(target: dict[str, Tensor], source: dict[str, Tensor]) -> KeyMatch:
    """Say which keys of ``target`` are in ``source`` with the same shape, and which are not."""
    shapes = {k: (tuple(source[k].shape), tuple(v.shape)) for k, v in target.items() if k in source}
    return KeyMatch(
        matched={key: source[key] for key, (there, here) in shapes.items() if there == here},
        missing=[key for key in target if key not in source],
        unexpected=[key for key in source if key not in target],
        reshaped={
            key: f'{key} is {there} in the file and {here} in the model'
            for key, (there, here) in shapes.items()
            if there != here
        },
    )


def match_weights(
    module: nn.Module, file: Checkpoint, prefix: str = '', *, adapt: bool = True
) -> KeyMatch:
    """Match the keys of a file that start with ``prefix`` with those of ``module``.

    The positions of a ``CAEViT`` (the module, or its backbone) follow the file's description; with
    ``adapt`` its ``adapt_state_dict`` works on the encoder's part first.
    """
    state, remarks = strip_prefix(file.state, prefix), []
    places: dict[str, Any] = {'': module, 'backbone.': getattr(module, 'backbone', None)}
    for place, encoder in places.items():
        if not hasattr(encoder, 'adapt_state_dict'):
            continue
        remarks += _follow_description(encoder, file, getattr(module, 'neck', None))
        inside = strip_prefix(state, place)
        if adapt and inside:
            outside = {k: v for k, v in state.items() if not k.startswith(place)}
            adapted, changes = encoder.adapt_state_dict(inside)
            state = outside | {f'{place}{k}': v for k, v in adapted.items()}
            remarks += changes
    target = module.state_dict()
    cause = _guess_cause(target, file.state, prefix)
    return replace(compare_keys(target, state), remarks=remarks, cause=cause)


def strip_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return what is under ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _follow_description(encoder: Any, file: Checkpoint, neck: Any) -> list[str]:
    """Refuse another number of heads, and resize positions from the file's size of pretraining.

    A ``CAENeck`` has the positions of its encoder, in its own width.
    """
    of_model, of_file = encoder.describe(), file.description or encoder.describe()
    if of_file.embed_dims != of_model.embed_dims:
        return []  # the shapes tell, and the message about them names both widths
    if of_file.num_heads != of_model.num_heads:
        raise ValueError(
            f'{file.path} was made with {of_file.num_heads} heads, but the model has '
            f'{of_model.num_heads}: the shapes are the same, the results are not. '
            'Set num_heads in arch'
        )
    if of_file.pretrain_img_size == of_model.pretrain_img_size:
        return []
    encoder.set_pretrain_size(of_file.pretrain_img_size)
    if hasattr(neck, 'positions'):
        neck.positions.set_base_grid(encoder.positions.base_grid)
    height, width = of_file.pretrain_img_size
    return [f'positions are resized from those for {height}x{width} pixels, as the file says']


def check_share(module: nn.Module, match: KeyMatch, min_matched: float, path: Path) -> None:
    """Raise if less than ``min_matched`` of the backbone (or module) matches, and say why."""
    target = module.state_dict()
    part = {k: v for k, v in target.items() if k.startswith('backbone.')} or target
    loaded = part.keys() & match.matched.keys()
    tensors = len(loaded) / len(part)
    elements = sum(part[k].numel() for k in loaded) / sum(v.numel() for v in part.values())
    if min(tensors, elements) >= min_matched:
        return
    where = f'{type(module).__name__}{".backbone" if part is not target else ""}'
    raise ValueError(
        f'{path} does not fit {where}: only {len(loaded)} of {len(part)} tensors '
        f'({elements:.1%} of the elements) match, at least {min_matched:.0%} must; '
        f'{match.explanation}'
    )


def log_match(module: nn.Module, match: KeyMatch, path: Path) -> None:
    """Log how many tensors were loaded, and each thing that did not fit as a warning."""
    name = type(module).__name__
    total = len(match.matched) + len(match.missing) + len(match.reshaped)
    for line in (f'{len(match.matched)} of {total} tensors loaded from {path}', *match.remarks):
        print_log(f'{name}: {line}', 'current')
    for problem in match.problems:
        print_log(f'{name}: {problem}', 'current', level=logging.WARNING)


def name_some(keys: list[str]) -> str:
    """List the first keys, and how many more there are."""
    more = f', ... ({len(keys) - MAX_KEYS_SHOWN} more)' if len(keys) > MAX_KEYS_SHOWN else ''
    return ', '.join(keys[:MAX_KEYS_SHOWN]) + more


def _guess_cause(target: dict[str, Tensor], source: dict[str, Tensor], prefix: str) -> str:
    """Name the likely cause: another prefix, names of another project, another size."""
    first = next(iter(target), '')
    prefixes = [k.removesuffix(first) for k in source if k.endswith(f'.{first}') or k == first]
    if prefixes and prefix not in prefixes:
        return f". The file has these keys under prefix='{prefixes[0]}'"
    origin = guess_source(source)
    if origin:
        return (
            f'. The file has the names of {origin} weights: convert it with '
            'tools/convert_checkpoint.py'
        )
    bare = first.removeprefix('backbone.')
    if bare != first and bare in source:
        return (
            ". The file holds a bare encoder: load it with the backbone's "
            "init_cfg=dict(type='Pretrained', checkpoint=...)"
        )
    token = [key for key in target if key.endswith('cls_token') and prefix + key in source]
    if token and source[prefix + token[0]].shape != target[token[0]].shape:
        widths = source[prefix + token[0]].shape[-1], target[token[0]].shape[-1]
        return f'. The file has width {widths[0]}, the model {widths[1]}: it is of another arch'
    return ''


def guess_source(keys: Collection[str]) -> str | None:
    """Name the project that names its weights so, None if none of them does (ours, for example).

    A fine-tuned encoder without relative position bias has the same keys in the official code and
    in timm, and means the same: it is called timm's.
    """
    return next((source for key, source in HALLMARKS.items() if key in keys), None)
