"""Read PASSL's files without Paddle: pickles of numpy arrays, with linear layers transposed.

``paddle.save`` writes a tensor as an array, or as a pair of its name and an array, depending on
how deep it lies: https://github.com/PaddlePaddle/Paddle/blob/v2.4.2/python/paddle/framework/io.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cae_mm.checkpoints.unpickler import PlainUnpickler, refusing

SUFFIXES = ('.pd', '.pdparams')


def read_paddle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.pd`` or ``.pdparams`` file, linear layers as torch has them.

    Raises:
        ValueError: If the file needs code to be run, or holds no dict of arrays.
    """
    with refusing(path), path.open('rb') as file:
        content = PlainUnpickler(file).load()
        if isinstance(content, dict) and isinstance(content.get('model'), dict):
            content = content['model']
        if not isinstance(content, dict):
            raise ValueError('it holds no state dict (a dict of arrays)')
        content.pop('StructuredToParameterName@@', None)  # Paddle's table of internal names
        return {str(k): _tensor(str(k), v) for k, v in content.items()}


def _tensor(key: str, value: Any) -> Tensor:
    array = value[1] if isinstance(value, tuple) and len(value) == 2 else value
    if not isinstance(array, np.ndarray) or array.dtype.kind not in 'fi':
        kind = getattr(array, 'dtype', type(array).__name__)
        raise ValueError(f'{key} is no array of numbers but {kind}')
    tensor = torch.from_numpy(array.copy())
    # Paddle's linear layers have shape (in, out), and nothing else two-dimensional is a weight
    return tensor.T.contiguous() if key.endswith('.weight') and tensor.ndim == 2 else tensor
