"""Load weights into a module: every key must fit, and no pickle is executed.

mmengine's own ``Pretrained`` initialiser loads with ``strict=False`` and falls back to executing
the pickle; a ``PretrainedModule`` loads through this file instead.
"""

import codecs
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import BaseModule
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

MAX_KEYS_SHOWN = 5


class PretrainedModule(BaseModule):
    """Load ``init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...)`` strictly.

    A subclass gives ``init_default_weights`` for the case without ``init_cfg``.
    """

    def init_weights(self) -> None:
        """Load the pretrained weights if ``init_cfg`` names some, else initialise."""
        if not self.init_cfg:
            self.init_default_weights()
            return
        options = {key: value for key, value in self.init_cfg.items() if key != 'type'}
        if self.init_cfg.get('type') != 'Pretrained' or not options.keys() <= {
            'checkpoint',
            'prefix',
        }:
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


def load_pretrained(module: nn.Module, checkpoint: str | Path, prefix: str = '') -> None:
    """Load the keys of a checkpoint that start with ``prefix`` into ``module``.

    Args:
        module: Where to load; must have exactly these keys and shapes.
        checkpoint: A ``.safetensors`` file or a ``.pth`` of mmengine or torch.
        prefix: For example 'backbone.' for the encoder of a pretraining checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a URL, or the file holds anything but plain data, or keys or shapes do
            not fit.
    """
    name = type(module).__name__
    if '://' in str(checkpoint):
        raise ValueError(f'{name} loads files only: download {checkpoint} first')
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        explain = getattr(module, 'explain_missing_weights', lambda: '')()
        raise FileNotFoundError(f'no weights for {name} at {path.absolute()}. {explain}')
    everything = read_state_dict(path)
    state = {k.removeprefix(prefix): v for k, v in everything.items() if k.startswith(prefix)}
    problems = compare_keys(module.state_dict(), state)
    if problems:
        hint = _hint_prefix(module.state_dict(), everything, prefix)
        raise ValueError(f'{path} does not fit {name}: {"; ".join(problems)}{hint}')
    module.load_state_dict(state)
    print_log(f'{name}: all {len(state)} tensors loaded from {path}', logger='current')


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file without executing its pickle.

    Args:
        path: A ``.safetensors`` file or a ``.pth``; in the latter a nested ``state_dict`` is used.

    Raises:
        ValueError: If the file needs code to be run, or holds no state dict.
    """
    path = Path(path)
    if path.suffix == '.safetensors':
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f'{path} is no complete safetensors file: {error}') from error
    content = read_plain_pickle(path, _MMENGINE_GLOBALS)
    state = content.get('state_dict', content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f'{path} holds no state dict (a dict of tensors)')
    return state


def read_plain_pickle(path: Path, allowed: list[Any]) -> Any:
    """Unpickle with torch's restricted unpickler, which refuses every global not allowed.

    Args:
        path: The file.
        allowed: Harmless classes and functions that may appear beside tensors.

    Raises:
        ValueError: If the file refers to anything else; the message names it.
    """
    before = list(torch.serialization.get_safe_globals())  # torch 2.4 gives the list itself
    torch.serialization.add_safe_globals(allowed)
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ...
        reason = f'{path} was refused, nothing in it was executed: {_explain(error)}'
        raise ValueError(reason) from error
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _explain(error: Exception) -> str:
    """One line out of torch's paragraphs, without their advice to allow what was refused."""
    name = re.search(r'GLOBAL (\S+)', str(error))
    if name:
        return f'it refers to {name[1]}, which is not allowed there'
    text = str(error).split('WeightsUnpickler error:')[-1].strip()
    return text.partition('\n')[0] or type(error).__name__


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wrap ``function`` under the name by which files refer to it; torch's list goes by names."""

    def call(*args: Any) -> Any:
        return function(*args)

    call.__module__, _, call.__name__ = name.rpartition('.')
    call.__qualname__ = call.__name__
    return call


def _history_statistic(owner: Any, name: str) -> str:
    """Stand for ``getattr(HistoryBuffer, 'mean')``, the only getattr in a Runner's checkpoint."""
    if owner is not HistoryBuffer:
        raise ValueError(f'getattr of {owner}')
    return name


# what mmengine's Runner puts beside the weights: the history of logged numbers, in numpy arrays
# whose module was renamed in numpy 2
_RECONSTRUCT: Any = np.zeros(1).__reduce__()[0]
_SCALAR: Any = np.float64(0).__reduce__()[0]
_MMENGINE_GLOBALS = [
    HistoryBuffer,
    codecs.encode,  # bytes in arrays
    _named(_history_statistic, 'builtins.getattr'),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ('f8', 'f4', 'i8', 'bool')),
    *(_named(_RECONSTRUCT, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
    *(_named(_SCALAR, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
]


def compare_keys(target: dict[str, Tensor], source: dict[str, Tensor]) -> list[str]:
    """Say which keys of ``target`` are missing from ``source``, not known to it, or reshaped."""
    reshaped = [
        f'{key} is {tuple(source[key].shape)} in the file and {tuple(value.shape)} in the model'
        for key, value in target.items()
        if key in source and source[key].shape != value.shape
    ]
    found = {
        'missing': [key for key in target if key not in source],
        'unexpected': [key for key in source if key not in target],
        'of another shape': reshaped,
    }
    return [f'{len(keys)} keys {what}: {_some(keys)}' for what, keys in found.items() if keys]


def _some(keys: list[str]) -> str:
    more = f', ... ({len(keys) - MAX_KEYS_SHOWN} more)' if len(keys) > MAX_KEYS_SHOWN else ''
    return ', '.join(keys[:MAX_KEYS_SHOWN]) + more


def _hint_prefix(target: dict[str, Tensor], source: dict[str, Tensor], prefix: str) -> str:
    """Name the prefix under which the file has the module's first key, if there is one."""
    first = next(iter(target))
    found = [k.removesuffix(first) for k in source if k.endswith(f'.{first}') or k == first]
    if not found or prefix in found:
        return ''
    return f". The file has these keys under prefix='{found[0]}'"
