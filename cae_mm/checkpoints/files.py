"""Read and write weights as plain data: nothing in a file is ever executed."""

import argparse
import codecs
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from cae_mm.checkpoints.description import KEY, EncoderDescription


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        state: The weights.
        metadata: What this project wrote beside them: 'encoder' and, in converted files, 'source',
            'part' and 'neck'; {} in files of others.
        path: The file.
    """

    state: dict[str, Tensor]
    metadata: dict[str, Any]
    path: Path

    @property
    def description(self) -> EncoderDescription | None:
        """Of its encoder, None if the file does not tell.

        Raises:
            ValueError: If it cannot be read.
        """
        return parse_description(self.metadata, self.path)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file without executing its pickle.

    Args:
        path: A ``.safetensors`` file or a ``.pth``; in the latter a nested ``state_dict``
            (mmengine) or ``model`` (official code) is used.

    Raises:
        ValueError: If the file needs code to be run, or holds no state dict.
    """
    path = Path(path)
    if path.suffix == '.safetensors':
        try:
            return Checkpoint(load_file(path), read_metadata(path), path)
        except SafetensorError as error:
            raise ValueError(f'{path} is no complete safetensors file: {error}') from error
    content = read_plain_pickle(path, HARMLESS)
    return Checkpoint(get_state_dict(content, path), get_metadata(content), path)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file as ``read_checkpoint`` does."""
    return read_checkpoint(path).state


def read_description(path: str | Path) -> EncoderDescription | None:
    """Read the description of a file's encoder, None if the file does not tell.

    Raises:
        ValueError: If the file or the description cannot be read.
    """
    path = Path(path)
    if path.suffix == '.safetensors':
        return parse_description(read_metadata(path), path)
    return parse_description(get_metadata(read_plain_pickle(path, HARMLESS)), path)


def parse_description(metadata: dict[str, Any], path: Path) -> EncoderDescription | None:
    """Take the encoder's description out of what stands beside weights, None if it is not there.

    Raises:
        ValueError: If it is incomplete.
    """
    if 'encoder' not in metadata:
        return None
    try:
        return EncoderDescription.from_dict(metadata['encoder'])
    except (AttributeError, TypeError) as error:
        raise ValueError(f'{path} has no readable description of its encoder: {error}') from error


def get_metadata(content: Any) -> dict[str, Any]:
    """Return what ``SafeLoadHook`` wrote into a checkpoint's meta, {} if it did not."""
    meta = content.get('meta') if isinstance(content, dict) else None
    metadata = meta.get(KEY) if isinstance(meta, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def get_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict in what a ``.pth`` file holds.

    Raises:
        ValueError: If there is none.
    """
    for key in ('state_dict', 'model'):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f'{path} holds no state dict (a dict of tensors)')
    return content


def read_plain_pickle(path: Path, allowed: list[Any], map_location: Any = 'cpu') -> Any:
    """Unpickle with torch's restricted unpickler, which refuses every global not allowed.

    Args:
        path: The file.
        allowed: Harmless classes and functions that may appear beside tensors.
        map_location: As in ``torch.load``.

    Raises:
        ValueError: If the file refers to anything else; the message names it.
    """
    before = list(torch.serialization.get_safe_globals())  # torch 2.4 gives the list itself
    # a history that is unpickled gives its statistics to all, those of the running log too
    statistics = dict(HistoryBuffer._statistics_methods)
    torch.serialization.add_safe_globals(allowed)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ...
        reason = f'{path} was refused, nothing in it was executed: {_explain(error)}'
        raise ValueError(reason) from error
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
        HistoryBuffer._statistics_methods.clear()
        HistoryBuffer._statistics_methods.update(statistics)


def _explain(error: Exception) -> str:
    """One line out of torch's paragraphs, without their advice to allow what was refused."""
    name = re.search(r'GLOBAL (\S+)', str(error))
    if name:
        return f'it refers to {name[1]}, which is not allowed there'
    text = str(error).split('WeightsUnpickler error:')[-1].strip().partition('\n')[0]
    # of bytes that are no pickle at all torch says the number of an opcode, or nothing
    if ' ' not in text or text.startswith('Unsupported operand'):
        return 'it is no file that torch.save wrote'
    return text


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wrap ``function`` under the name by which files refer to it; torch's list goes by names."""

    def call(*args: Any) -> Any:
        return function(*args)

    call.__module__, _, call.__name__ = name.rpartition('.')
    call.__qualname__ = call.__name__
    return call


def _history_statistic(owner: Any, name: str) -> Callable[..., Any]:
    """Stand for ``getattr(HistoryBuffer, 'mean')``, the only getattr in a Runner's checkpoint."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise ValueError(f'getattr of {owner}, {name}')
    return getattr(HistoryBuffer, name)


# what mmengine's Runner puts beside the weights: the history of logged numbers, in numpy arrays
# whose module was renamed in numpy 2; and the official code: its command line
_RECONSTRUCT: Any = np.zeros(1).__reduce__()[0]
_SCALAR: Any = np.float64(0).__reduce__()[0]
HARMLESS = [
    HistoryBuffer,
    argparse.Namespace,
    codecs.encode,  # bytes in arrays
    _named(_history_statistic, 'builtins.getattr'),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ('f8', 'f4', 'i8', 'bool')),
    *(_named(_RECONSTRUCT, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
    *(_named(_SCALAR, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
]


def read_metadata(path: Path) -> dict[str, Any]:
    """Read what ``tools/convert_checkpoint.py`` wrote beside the weights; {} for other files."""
    if path.suffix != '.safetensors':
        return {}
    try:
        with safe_open(path, 'pt') as file:
            return json.loads((file.metadata() or {}).get(KEY, '{}'))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f'{path} has no readable metadata: {error}') from error


def write_safetensors(
    path: Path, state: dict[str, Tensor], metadata: dict[str, Any] | None = None
) -> None:
    """Write tensors and metadata; the file appears when it is complete, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + '.unfinished')
    header = {'format': 'pt'} | ({KEY: json.dumps(metadata)} if metadata else {})
    try:
        data = save({k: v.contiguous() for k, v in state.items()}, metadata=header)
        unfinished.write_bytes(data)  # save_file would leave it readable to its owner alone
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
