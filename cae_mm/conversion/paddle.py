"""Read PASSL's files without Paddle: pickles of numpy arrays, with linear layers transposed.

``paddle.save`` writes a tensor as an array, or as a pair of its name and an array, depending on
how deep it lies: https://github.com/PaddlePaddle/Paddle/blob/v2.4.2/python/paddle/framework/io.py
"""

import argparse
import codecs
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUFFIXES = ('.pd', '.pdparams')
_RECONSTRUCT: Any = np.zeros(1).__reduce__()[0]
_SCALAR: Any = np.float64(0).__reduce__()[0]


class PlainUnpickler(pickle.Unpickler):
    """Knows numpy arrays and plain containers; everything else is refused."""

    known: dict[str, Any] = {
        '_codecs.encode': codecs.encode,
        '__builtin__.tuple': tuple,
        'argparse.Namespace': argparse.Namespace,
        'builtins.tuple': tuple,
        'collections.OrderedDict': OrderedDict,
        'numpy.dtype': np.dtype,
        'numpy.ndarray': np.ndarray,
        **{f'numpy.{core}.multiarray._reconstruct': _RECONSTRUCT for core in ('core', '_core')},
        **{f'numpy.{core}.multiarray.scalar': _SCALAR for core in ('core', '_core')},
    }

    def find_class(self, module: str, name: str) -> Any:
        """Look the name up; nothing is imported."""
        if f'{module}.{name}' not in self.known:
            raise ValueError(f'it refers to {module}.{name}, which is not allowed there')
        return self.known[f'{module}.{name}']


def read_paddle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.pd`` or ``.pdparams`` file, linear layers as torch has them.

    Raises:
        ValueError: If the file needs code to be run, or holds no dict of arrays.
    """
    try:
        with path.open('rb') as file:
            content = PlainUnpickler(file).load()
    except Exception as error:  # a pickle's bytes can raise anything
        raise ValueError(f'{path} was refused, nothing in it was executed: {error}') from error
    if isinstance(content, dict) and isinstance(content.get('model'), dict):
        content = content['model']
    if not isinstance(content, dict):
        raise ValueError(f'{path} holds no state dict (a dict of arrays)')
    # Paddle's table of internal names
    return {
        k: _tensor(k, v, path) for k, v in content.items() if k != 'StructuredToParameterName@@'
    }


def _tensor(key: str, value: Any, path: Path) -> Tensor:
    array = value[1] if isinstance(value, tuple) and len(value) == 2 else value
    if not isinstance(array, np.ndarray) or array.dtype.kind not in 'fi':
        kind = getattr(array, 'dtype', type(array).__name__)
        raise ValueError(f'{path}: {key} is no array of numbers but {kind}')
    tensor = torch.from_numpy(array.copy())
    # Paddle's linear layers have shape (in, out), and nothing else two-dimensional is a weight
    return tensor.T.contiguous() if key.endswith('.weight') and tensor.ndim == 2 else tensor
