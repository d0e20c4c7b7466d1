"""Read pickles as plain data: of torch, in its format since 1.6 and the one before, and of Paddle.

A pickle is a program. Here it can name, call and fill in only what stands in a table, by name;
nothing is imported, and what the table has instead of functions of torch or numpy does no more
than the plain case needs.

References:
    Instructions of a pickle: https://github.com/python/cpython/blob/3.11/Lib/pickletools.py
    Formats: https://github.com/pytorch/pytorch/blob/v2.4.1/torch/serialization.py
"""

import argparse
import os
import pickle
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from math import prod
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
STORAGES |= {'ComplexFloat': torch.complex64, 'ComplexDouble': torch.complex128}
# of types without a class of storages
OTHER_TYPES = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
MANY = 2**20  # elements that a tensor may have although its memory is smaller, as after `expand`
# classes of Python 2, registered extensions, keyword arguments, memory from elsewhere
REFUSED = 'INST OBJ EXT1 EXT2 EXT4 NEWOBJ_EX PERSID NEXT_BUFFER READONLY_BUFFER'
REFUSED_CODES = [getattr(pickle, name)[0] for name in REFUSED.split()]


class Shell:
    """Stands for the class of a pickled object: takes its state and does nothing else."""


def _name(thing: Any) -> str:
    """Name a function, or else the type: writing out what a file holds could take for ever."""
    return getattr(thing, '__qualname__', type(thing).__name__)


def _expect(thing: Any, *kinds: type) -> None:
    if type(thing) not in kinds:
        raise ValueError(
            f'it has a {_name(type(thing))} where plain data have a {kinds[0].__name__}'
        )


def _check_keys(keys: Iterable[Any]) -> None:
    """Let keys of dicts and elements of sets be tuples, but not of tuples.

    Hashing these takes time that doubles with each level, or all of the stack.
    """
    for key in keys:
        if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
            raise ValueError('it has tuples of tuples as keys')


def _rebuild_tensor(flat: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """Return a view of ``flat`` that lies in it: torch's own check is of numbers of 64 bits."""
    _expect(flat, Tensor)
    for number in (offset, *size, *stride):
        _expect(number, int)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    inside = last < len(flat) if all(size) else offset <= len(flat)
    most = max(len(flat), MANY)
    if not inside or min(0, offset, *size, *stride) < 0 or max(0, *size, prod(size[:64])) > most:
        raise ValueError(f'it has a tensor that does not fit into {len(flat)} numbers of memory')
    return flat.as_strided(size, stride, offset)


def _rebuild_typed(
    memory: Any, offset: int, size: Any, stride: Any, _: Any, __: Any, dtype: Any, *___: Any
) -> Tensor:
    """Rebuild a tensor whose memory is kept as bytes."""
    _expect(memory, Tensor)
    _expect(dtype, torch.dtype)
    return _rebuild_tensor(memory.view(dtype), offset, size, stride)


def _rebuild_subclass(rebuild: Any, kind: Any, args: Any, *_: Any) -> Tensor:
    if rebuild is not _rebuild_tensor:
        raise ValueError(f'it has a tensor made by {_name(rebuild)}')
    return _rebuild_tensor(*args)


def _statistic(owner: Any, name: str) -> str:
    """Stand for ``getattr(HistoryBuffer, 'mean')``, the only getattr in a Runner's checkpoint."""
    if owner is not HistoryBuffer or name not in STATISTICS:
        raise ValueError(f'it refers to getattr of {_name(owner)}, which is not allowed there')
    return name


class Number:
    """Stands for numpy's type of numbers, whose own state could make it read any memory."""

    def __init__(self, kind: str, *_: Any) -> None:
        _expect(kind, str)
        self.dtype = np.dtype(kind)
        if self.dtype.kind not in 'biufSU':
            raise ValueError(f'it has arrays of {self.dtype}, not of numbers')


def _from_bytes(data: Any, number: Any) -> np.ndarray:
    """Return an array of what lies in ``data``, which nothing can change."""
    _expect(data, bytes, bytearray)
    _expect(number, Number)
    return np.frombuffer(data, number.dtype)


def _encode(text: Any, *_: Any) -> bytes:
    _expect(text, str)
    return text.encode('latin1')


def _make_bytearray(data: Any = b'', *_: Any) -> bytearray:
    _expect(data, bytes, str)
    return bytearray(data if isinstance(data, bytes) else _encode(data))


def _make_tuple(items: Any = ()) -> tuple[Any, ...]:
    _expect(items, list, tuple)
    return tuple(items)


def _make_set(items: Any = ()) -> set[Any]:
    _expect(items, list, tuple)
    _check_keys(items)
    return set(items)


def _make_dict(items: Any = ()) -> dict[Any, Any]:
    """Make a dict of another one, whose keys were checked, or of pairs (Python 2)."""
    _expect(items, dict, list, tuple)
    if not isinstance(items, dict):
        _check_keys(key for key, _ in items)
    return dict(items)


def _set_order(number: Number, state: Any) -> None:
    number.dtype = number.dtype.newbyteorder(state[1])


def _set_array(array: Any, state: Any) -> None:
    version, shape, number, order, data = state
    _expect(number, Number)
    _expect(data, bytes, str)
    array.__setstate__((version, shape, number.dtype, order, data))


def _set_versions(state_dict: Any, state: dict[str, Any]) -> None:
    """Keep the versions of layers, by which some of them know old names."""
    versions = state.get('_metadata')
    if isinstance(versions, dict) and all(isinstance(of, dict) for of in versions.values()):
        state_dict._metadata = versions


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
    '_codecs.encode': _encode,  # bytes before protocol 3
    'argparse.Namespace': argparse.Namespace,
    'builtins.bytearray': _make_bytearray,
    'builtins.bytes': lambda: b'',  # no bytes, before protocol 3
    'builtins.frozenset': lambda items: frozenset(_make_set(items)),
    'builtins.getattr': _statistic,
    'builtins.set': _make_set,
    'builtins.tuple': _make_tuple,
    'collections.Counter': lambda counts: Counter(_make_dict(counts)),
    'collections.OrderedDict': lambda *items: OrderedDict(_make_dict(*items)),
    'collections.defaultdict': lambda *_: {},
    'mmengine.config.config.ConfigDict': _make_dict,
    'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
    **{f'mmengine.logging.history_buffer.HistoryBuffer.{name}': name for name in STATISTICS},
    'numpy.core.multiarray._reconstruct': lambda *_: np.ndarray(0),
    'numpy.core.multiarray.scalar': lambda number, data: _from_bytes(data, number)[0],
    'numpy.core.numeric._frombuffer': lambda data, number, shape, order: _from_bytes(
        data, number
    ).reshape(shape, order=order),
    'numpy.dtype': Number,
    'numpy.ndarray': 'ndarray',  # named to _reconstruct, never called
    'torch.Size': _make_tuple,
    'torch.Tensor': 'Tensor',  # named to _rebuild_from_type_v2, never called
    'torch.device': torch.device,
    'torch._tensor._rebuild_from_type_v2': _rebuild_subclass,
    'torch._utils._rebuild_parameter': lambda data, *_: data,
    'torch._utils._rebuild_parameter_with_state': lambda data, *_: data,
    'torch._utils._rebuild_tensor': _rebuild_tensor,
    'torch._utils._rebuild_tensor_v2': _rebuild_tensor,
    'torch._utils._rebuild_tensor_v3': _rebuild_typed,
    'torch.storage.UntypedStorage': torch.uint8,
    **{str(dtype): dtype for dtype in (*STORAGES.values(), *OTHER_TYPES)},
    **{f'torch.{name}Storage': dtype for name, dtype in STORAGES.items()},
    **{f'torch.cuda.{name}Storage': dtype for name, dtype in STORAGES.items()},
}
# objects that are made without a call, and how these and others get their state
OBJECTS = (Shell, argparse.Namespace, HistoryBuffer)
SETTERS: dict[type, Callable[[Any, Any], None]] = {
    Shell: _set_attributes,
    argparse.Namespace: _set_attributes,
    HistoryBuffer: _set_history,
    OrderedDict: _set_versions,
    Number: _set_order,
    np.ndarray: _set_array,
}
DICTS = (dict, OrderedDict, Counter)
COPIED = (str, bytes, bytearray, list, tuple, dict)
# what a pickle raises that breaks off, or whose end was written over
INCOMPLETE = (EOFError, IndexError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile)


class PlainUnpickler(pickle._Unpickler):
    """Reads a pickle, in which the names in ``KNOWN`` and ``known`` may occur.

    Args:
        file: At the beginning of the pickle.
        known: As of ``read_plain_pickle``.
        size: Of the whole file in bytes, which bounds what is made of it; None: that of ``file``.

    Attributes:
        storages: Memory of torch's tensors, by key, which is filled afterwards.
    """

    stack: list[Any]
    metastack: list[list[Any]]

    def __init__(
        self, file: BinaryIO, known: Mapping[str, Any] | None = None, size: int | None = None
    ) -> None:
        super().__init__(file, encoding='utf-8')  # type: ignore[arg-type]
        self.known = KNOWN | dict(known or {})
        self.storages: dict[str, Tensor] = {}
        start = file.tell()
        end = file.seek(0, os.SEEK_END)
        file.seek(start)
        # lengths may be lies: nothing is reserved that the file could not fill
        self._file_read = lambda length: file.read(min(length, end))
        # what may still be made: bytes of storages, bytes of views of them, elements of copies
        self.storage = end if size is None else size
        self.views = 8 * (self.storage + MANY)
        self.copies = 2 * end + MANY

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up; nothing is imported."""
        module = module.replace('__builtin__', 'builtins').replace('numpy._core', 'numpy.core')
        if f'{module}.{name}' not in self.known:
            raise ValueError(
                f'it refers to {module}.{name}, which is not allowed there. Ask for the weights '
                'alone, or see "When it says no" in docs/checkpoints.md'
            )
        return self.known[f'{module}.{name}']

    def persistent_load(self, pid: Any) -> Any:
        """Return the memory ('storage', dtype, key, device, length), or a module's class."""
        _expect(pid, tuple)
        if pid[0] == 'module':
            return pid[1]
        _, dtype, key, _, length, *view = pid
        for value, kind in ((dtype, torch.dtype), (key, str), (length, int)):
            _expect(value, kind)
        if key not in self.storages:
            self.storage -= abs(length) * dtype.itemsize
            if self.storage < 0:
                raise EOFError('more tensors than bytes')
            self.storages[key] = torch.empty(length, dtype=dtype)
        flat = self.storages[key]
        if any(view) or (flat.dtype, len(flat)) != (dtype, length):
            raise ValueError('it has tensors that share memory in a way that is not read here')
        return flat

    def load_reduce(self) -> None:
        """Call a function of the table."""
        function, args = self.stack[-2:]
        if function in OBJECTS or not any(function is value for value in self.known.values()):
            raise ValueError(f'it calls {_name(function)}, which is not allowed there')
        _expect(args, tuple)
        self._account(args)
        super().load_reduce()  # type: ignore[misc]
        if isinstance(self.stack[-1], Tensor):
            self.views -= self.stack[-1].nbytes
            self._account()

    def _account(self, copied: Iterable[Any] = ()) -> None:
        """Refuse small files that would become large: the same data again and again."""
        for value in copied:
            if isinstance(value, np.ndarray):
                self.copies -= value.nbytes
            elif isinstance(value, COPIED):
                self.copies -= len(value)
        if min(self.copies, self.views) < 0:
            raise ValueError('it makes far more data than it holds')

    def load_newobj(self) -> None:
        """Make an empty object."""
        if self.stack[-2] not in OBJECTS:
            raise ValueError(f'it calls {_name(self.stack[-2])}, which is not allowed there')
        super().load_newobj()  # type: ignore[misc]

    def load_build(self) -> None:
        """Set the state of an object whose class has a setter, never of a class or function."""
        state = self.stack.pop()
        instance = self.stack[-1]
        parts = state.values() if isinstance(state, dict) else state
        self._account([state, *parts] if isinstance(state, dict | tuple) else [])
        for kind, set_state in SETTERS.items():
            if isinstance(instance, kind):
                return set_state(instance, state)
        raise ValueError(f'it sets the state of {_name(instance)}, which is not allowed there')

    def load_bytearray8(self) -> None:
        """Read before the memory is taken."""
        (length,) = struct.unpack('<Q', self.read(8))  # type: ignore[attr-defined]
        self.stack.append(bytearray(self.read(length)))  # type: ignore[attr-defined]

    def load_append(self) -> None:
        """Append to a list, and to nothing else that has such a method."""
        _expect(self.stack[-2], list)
        super().load_append()  # type: ignore[misc]

    def load_appends(self) -> None:
        """As ``load_append``."""
        _expect(self.metastack[-1][-1], list)
        super().load_appends()  # type: ignore[misc]

    def load_setitem(self) -> None:
        """Set an item of a dict, and of nothing else that has items."""
        _expect(self.stack[-3], *DICTS)
        _check_keys(self.stack[-2:-1])
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        """As ``load_setitem``."""
        _expect(self.metastack[-1][-1], *DICTS)
        _check_keys(self.stack[::2])
        super().load_setitems()  # type: ignore[misc]

    def load_dict(self) -> None:
        """Make a dict of the items since the mark."""
        _check_keys(self.stack[::2])
        super().load_dict()  # type: ignore[misc]

    def load_additems(self) -> None:
        """Add to a set, and to nothing else that has such a method."""
        _expect(self.metastack[-1][-1], set)
        _check_keys(self.stack)
        super().load_additems()  # type: ignore[misc]

    def load_frozenset(self) -> None:
        """Make a set of the items since the mark."""
        _check_keys(self.stack)
        super().load_frozenset()  # type: ignore[misc]

    def _refuse(self) -> None:
        raise ValueError('it has instructions that plain data do not need')

    dispatch = (
        dict.fromkeys(range(256), _refuse)
        | pickle._Unpickler.dispatch
        | dict.fromkeys(REFUSED_CODES, _refuse)
        | {
            pickle.ADDITEMS[0]: load_additems,
            pickle.APPEND[0]: load_append,
            pickle.APPENDS[0]: load_appends,
            pickle.BUILD[0]: load_build,
            pickle.BYTEARRAY8[0]: load_bytearray8,
            pickle.DICT[0]: load_dict,
            pickle.FROZENSET[0]: load_frozenset,
            pickle.NEWOBJ[0]: load_newobj,
            pickle.REDUCE[0]: load_reduce,
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
        }
    )


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Name the file in whatever its bytes raise."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        incomplete = isinstance(error, INCOMPLETE)
        reason = 'it is damaged or not complete, download it again' if incomplete else str(error)
        text = f'{path} was refused, nothing in it was executed: {reason or repr(error)}'
        raise ValueError(text) from error


def read_plain_pickle(path: Path, known: Mapping[str, Any] | None = None) -> Any:
    """Read what ``torch.save`` wrote, onto the CPU, without executing anything in it.

    Memory stays within that of the tensors, which is less than the file's size, and some 200 times
    that of what is pickled beside them.

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
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        check_records(archive, size)
        root = archive.namelist()[0].partition('/')[0]
        order = f'{root}/byteorder'
        if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
            raise ValueError('it was written on a machine with another order of bytes')
        unpickler = PlainUnpickler(BytesIO(archive.read(f'{root}/data.pkl')), known, size)
        content = unpickler.load()
        for key, flat in unpickler.storages.items():
            with archive.open(f'{root}/data/{key}') as data:
                _fill(flat, data)
    return content


def check_records(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse records of more than the file's ``size``: torch and numpy compress nothing."""
    records = archive.infolist()
    packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if packed or sum(record.file_size for record in records) > size:
        raise ValueError('it has records that are larger than what the file holds of them')


def _read_old_format(file: BinaryIO, known: Mapping[str, Any] | None) -> Any:
    """Read magic number, version, machine, object, keys of storages, and then their bytes."""
    unpicklers = [PlainUnpickler(file, known) for _ in range(5)]
    *_, content, keys = [unpickler.load() for unpickler in unpicklers]
    storages = unpicklers[3].storages
    _expect(keys, list)
    for key in keys:
        _expect(key, str)
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
