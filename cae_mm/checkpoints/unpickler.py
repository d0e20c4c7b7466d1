"""Read pickles as plain data: of torch, in its format since 1.6 and the one before, and of Paddle.

A pickle is a program. Here it can name, call and fill in only what stands in a table, by name;
nothing is imported, and what the table has instead of functions of torch or numpy does no more
than the plain case needs.

References:
    Instructions of a pickle: https://github.com/python/cpython/blob/3.11/Lib/pickletools.py
    Formats: https://github.com/pytorch/pytorch/blob/v2.4.1/torch/serialization.py
"""

import argparse
import pickle
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

MAGIC = tuple(pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=p) for p in range(6))
STATISTICS = ('min', 'max', 'current', 'mean')
NAMES = 'Double Float Half BFloat16 Long Int Short Bool'.split()
STORAGES = {name: getattr(torch, name.lower()) for name in NAMES}
STORAGES |= {'Char': torch.int8, 'Byte': torch.uint8}
# classes of Python 2, registered extensions, keyword arguments, memory from elsewhere
REFUSED = 'INST OBJ EXT1 EXT2 EXT4 NEWOBJ_EX PERSID NEXT_BUFFER READONLY_BUFFER'
REFUSED_CODES = [getattr(pickle, name)[0] for name in REFUSED.split()]


class Shell:
    """Stands for the class of a pickled object: takes its state and does nothing else."""


def _rebuild_tensor(flat: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return flat.as_strided(size, stride, offset)


def _rebuild_subclass(rebuild: Any, kind: Any, args: Any, *_: Any) -> Tensor:
    if rebuild is not _rebuild_tensor:
        raise ValueError(f'a tensor made by {rebuild}')
    return _rebuild_tensor(*args)


def _statistic(owner: Any, name: str) -> str:
    """Stand for ``getattr(HistoryBuffer, 'mean')``, the only getattr in a Runner's checkpoint."""
    if owner is not HistoryBuffer or name not in STATISTICS:
        raise ValueError(f'it refers to getattr of {owner}, {name}, which is not allowed there')
    return name


class Number:
    """Stands for numpy's type of numbers, whose own state could make it read any memory."""

    def __init__(self, kind: str, *_: Any) -> None:
        self.dtype = np.dtype(str(kind))
        if self.dtype.kind not in 'biufSU':
            raise ValueError(f'it has arrays of {self.dtype}, not of numbers')


def _set_order(number: Number, state: Any) -> None:
    number.dtype = number.dtype.newbyteorder(state[1])


def _set_array(array: Any, state: Any) -> None:
    version, shape, number, order, data = state
    array.__setstate__((version, shape, number.dtype, order, data))


def _set_history(history: HistoryBuffer, state: dict[str, Any]) -> None:
    """Set the numbers; mmengine would give the statistics in the file to all histories."""
    numbers = [state[key] for key in ('_log_history', '_count_history')]
    if not all(isinstance(array, np.ndarray) for array in numbers):
        raise ValueError('it has a history of something else than numbers')
    HistoryBuffer.__init__(history, *numbers, state['max_length'])  # type: ignore[misc]


def _set_attributes(instance: Any, state: dict[str, Any]) -> None:
    special = [name for name in state if name.startswith('__')]  # numpy looks for some of them
    if special:
        raise ValueError(f'it sets {special[0]} of an object')
    vars(instance).update(state)


# What files may refer to. Beside the weights mmengine's Runner puts the history of logged numbers
# and the state of schedulers, the official code its command line.
KNOWN: dict[str, Any] = {
    '_codecs.encode': lambda text, *_: text.encode('latin1'),  # bytes before protocol 3
    'argparse.Namespace': argparse.Namespace,
    'builtins.bytes': lambda: b'',  # no bytes, before protocol 3
    'builtins.getattr': _statistic,
    'builtins.set': set,
    'builtins.tuple': tuple,
    'collections.Counter': Counter,
    'collections.OrderedDict': OrderedDict,
    'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
    **{f'mmengine.logging.history_buffer.HistoryBuffer.{name}': name for name in STATISTICS},
    'numpy.core.multiarray._reconstruct': lambda *_: np.ndarray(0),
    'numpy.core.multiarray.scalar': lambda number, data: np.frombuffer(data, number.dtype)[0],
    'numpy.core.numeric._frombuffer': lambda data, number, shape, order: np.frombuffer(
        data, number.dtype
    ).reshape(shape, order=order),
    'numpy.dtype': Number,
    'numpy.ndarray': 'ndarray',  # named to _reconstruct, never called
    'torch.Size': tuple,
    'torch.device': torch.device,
    'torch._tensor._rebuild_from_type_v2': _rebuild_subclass,
    'torch._utils._rebuild_parameter': lambda data, *_: data,
    'torch._utils._rebuild_parameter_with_state': lambda data, *_: data,
    'torch._utils._rebuild_tensor': _rebuild_tensor,
    'torch._utils._rebuild_tensor_v2': _rebuild_tensor,
    **{str(dtype): dtype for dtype in STORAGES.values()},
    **{f'torch.{name}Storage': dtype for name, dtype in STORAGES.items()},
    **{f'torch.cuda.{name}Storage': dtype for name, dtype in STORAGES.items()},
}
# objects that are made without a call, and how these and others get their state
OBJECTS = (Shell, argparse.Namespace, HistoryBuffer)
SETTERS: dict[type, Callable[[Any, Any], None]] = {
    Shell: _set_attributes,
    argparse.Namespace: _set_attributes,
    HistoryBuffer: _set_history,
    OrderedDict: lambda *_: None,  # torch notes versions of layers there
    Number: _set_order,
    np.ndarray: _set_array,
}


class PlainUnpickler(pickle._Unpickler):
    """Reads a pickle, in which the names in ``KNOWN`` and ``known`` may occur.

    Attributes:
        storages: Memory of torch's tensors, by key, which is filled afterwards.
    """

    stack: list[Any]

    def __init__(self, file: BinaryIO, known: Mapping[str, Any] | None = None) -> None:
        super().__init__(file, encoding='utf-8')  # type: ignore[arg-type]
        self.known = KNOWN | dict(known or {})
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up; nothing is imported."""
        module = module.replace('__builtin__', 'builtins').replace('numpy._core', 'numpy.core')
        if f'{module}.{name}' not in self.known:
            raise ValueError(f'it refers to {module}.{name}, which is not allowed there')
        return self.known[f'{module}.{name}']

    def persistent_load(self, pid: Any) -> Any:
        """Return the memory ('storage', dtype, key, device, length), or a module's class."""
        if pid[0] == 'module':
            return pid[1]
        _, dtype, key, _, length, *view = pid
        if key not in self.storages:
            self.storages[key] = torch.empty(length, dtype=dtype)
        flat = self.storages[key]
        if any(view) or (flat.dtype, len(flat)) != (dtype, length):
            raise ValueError('it has tensors that share memory in a way that is not read here')
        return flat

    def load_reduce(self) -> None:
        """Call a function of the table."""
        function = self.stack[-2]
        if function in OBJECTS or not any(function is value for value in self.known.values()):
            raise ValueError(f'it calls {function!r}, which is not allowed there')
        super().load_reduce()  # type: ignore[misc]

    def load_newobj(self) -> None:
        """Make an empty object."""
        if self.stack[-2] not in OBJECTS:
            raise ValueError(f'it calls {self.stack[-2]!r}, which is not allowed there')
        super().load_newobj()  # type: ignore[misc]

    def load_build(self) -> None:
        """Set the state of an object whose class has a setter, never of a class or function."""
        state = self.stack.pop()
        instance = self.stack[-1]
        for kind, set_state in SETTERS.items():
            if isinstance(instance, kind):
                return set_state(instance, state)
        raise ValueError(f'it sets the state of {instance!r}, which is not allowed there')

    def _refuse(self) -> None:
        raise ValueError('it has instructions that plain data do not need')

    dispatch = (
        dict.fromkeys(range(256), _refuse)
        | pickle._Unpickler.dispatch
        | dict.fromkeys(REFUSED_CODES, _refuse)
        | {
            pickle.REDUCE[0]: load_reduce,
            pickle.NEWOBJ[0]: load_newobj,
            pickle.BUILD[0]: load_build,
        }
    )


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Name the file in whatever its bytes raise."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        incomplete = isinstance(error, EOFError | zipfile.BadZipFile)
        reason = 'it is not complete, download it again' if incomplete else str(error)
        text = f'{path} was refused, nothing in it was executed: {reason or repr(error)}'
        raise ValueError(text) from error


def read_plain_pickle(path: Path, known: Mapping[str, Any] | None = None) -> Any:
    """Read what ``torch.save`` wrote, onto the CPU, without executing anything in it.

    Args:
        path: The file.
        known: Stand-ins for names that it may refer to beside those of tensors, numpy arrays and
            plain containers: functions are called, a class has to be ``Shell``.

    Raises:
        ValueError: If the file refers to anything else (the message names it), or is broken.
    """
    with refusing(path), path.open('rb') as file:
        start = file.read(max(map(len, MAGIC)))
        file.seek(0)
        if start.startswith(b'PK\x03\x04'):
            return _read_zip(file, known)
        if start.startswith(MAGIC):
            return _read_old_format(file, known)
        raise ValueError('it is no file that torch.save wrote')


def _read_zip(file: BinaryIO, known: Mapping[str, Any] | None) -> Any:
    """Read data.pkl and a file for each storage."""
    with zipfile.ZipFile(file) as archive:
        root, *_ = archive.namelist()[0].split('/')
        order = f'{root}/byteorder'
        if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
            raise ValueError('it was written on a machine with another order of bytes')
        unpickler = PlainUnpickler(BytesIO(archive.read(f'{root}/data.pkl')), known)
        content = unpickler.load()
        for key, flat in unpickler.storages.items():
            with archive.open(f'{root}/data/{key}') as data:
                _fill(flat, data)
    return content


def _read_old_format(file: BinaryIO, known: Mapping[str, Any] | None) -> Any:
    """Read magic number, version, machine, object, keys of storages, and then their bytes."""
    unpicklers = [PlainUnpickler(file, known) for _ in range(5)]
    *_, content, keys = [unpickler.load() for unpickler in unpicklers]
    storages = unpicklers[3].storages
    if set(keys) != storages.keys():
        raise ValueError('it has tensors without data or data without tensors')
    for key in keys:
        if int.from_bytes(file.read(8), 'little') != len(storages[key]):
            raise EOFError('another length')
        _fill(storages[key], file)
    return content


def _fill(flat: Tensor, file: Any) -> None:
    if file.readinto(flat.view(torch.uint8).numpy()) != flat.nbytes:
        raise EOFError('too few bytes')
