"""Feeds readers with damaged and hostile files, in a process of its own that is watched.

python tests/fuzzing.py FOLDER SEED CASES prints, as JSON, what became of them. It fails at the
first file that is executed, takes much memory or time, or whose error does not name it; that file
stays in FOLDER.

Watched are Python's audit events (whatever executes, starts, writes, removes, connects), resident
memory and time.
"""

import faulthandler
import io
import json
import os
import pickle
import random
import resource
import struct
import sys
import tarfile
import time
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'
warnings.simplefilter('ignore')

import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmengine.config import ConfigDict  # noqa: E402
from mmengine.logging import HistoryBuffer  # noqa: E402
from pickles import Call  # noqa: E402
from safetensors.torch import save  # noqa: E402

from cae_mm.checkpoints import read_checkpoint  # noqa: E402
from cae_mm.checkpoints.unpickler import KNOWN, read_plain_pickle  # noqa: E402
from cae_mm.conversion import convert_checkpoint, convert_dalle  # noqa: E402
from cae_mm.conversion.paddle import read_paddle  # noqa: E402
from cae_mm.datasets.shard_index import INDEX_FILE, load_index  # noqa: E402
from cae_mm.datasets.shards import ShardFiles  # noqa: E402

SECONDS = 20  # for one file, on a busy machine
MEGABYTES = 256  # of resident memory, for files of a few kB
ADDRESSES = 6 * 2**30  # bytes beyond which not even a reservation may go
FORBIDDEN = {
    'exec', 'pickle.find_class', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork',
    'subprocess.Popen', 'socket.connect', 'socket.getaddrinfo', 'urllib.Request', 'ctypes.dlopen',
    'builtins.breakpoint',
}  # fmt: skip
ELSEWHERE = {  # outside the folder
    'os.mkdir', 'os.remove', 'os.rmdir', 'os.rename', 'os.symlink', 'os.chmod', 'os.truncate',
    'shutil.rmtree', 'open',
}  # fmt: skip
SPECIAL = [0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1]
TARGETS = [
    'os system', 'posix system', 'builtins exec', 'builtins eval', 'builtins __import__',
    'builtins open', 'builtins getattr', 'builtins compile', 'subprocess Popen', 'shutil rmtree',
    'pickle loads', 'torch load', 'torch.hub load', 'importlib import_module', 'functools partial',
    'operator attrgetter', 'operator methodcaller', 'types CodeType', 'types FunctionType',
    'numpy load', 'numpy.ctypeslib load_library', 'numpy.core.multiarray fromfile', 'ctypes CDLL',
    'torch.jit._script _import', 'mmengine.config Config', 'cae_mm.apis init_model',
    'code interact',
]  # fmt: skip


WATCHING = []


class Canary(BaseException):
    """Something was executed; no `except Exception` hides it."""


def watch(folder):
    """Raise Canary from now on, wherever something forbidden happens."""

    def look(event, args):
        if not WATCHING:
            return
        reads = event == 'open' and not (isinstance(args[1], str) and set(args[1]) & set('wax+'))
        away = event in ELSEWHERE and not reads and not str(args[0]).startswith(str(folder))
        imports = event == 'exec' and os.path.isfile(args[0].co_filename)
        if away or (event in FORBIDDEN and not imports):
            raise Canary(f'{event} {str(args)[:200]}')

    WATCHING.append(folder)
    sys.addaudithook(look)
    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, used + ADDRESSES))


def runner_content():
    """What a Runner writes, in small."""
    weight = torch.arange(24.0).reshape(4, 6)
    state = OrderedDict(a=weight, b=weight.T[1:], c=torch.tensor(1, dtype=torch.bfloat16))
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    optimizer = dict(state={0: dict(step=torch.tensor(3.0))}, param_groups=[dict(params=[0])])
    scalars = dict(loss=history, score=np.float32(2), array=np.arange(5))
    return dict(
        meta=dict(epoch=1, dataset_meta=ConfigDict(classes=('a', 'b'))),
        state_dict=state,
        optimizer=optimizer,
        message_hub=dict(log_scalars=scalars, runtime_info=Counter(a=1), resumed_keys={'a': True}),
        other=[{1, 2}, frozenset('ab'), b'bytes', bytearray(b'x'), 2**70, None],
    )


def saved(content, **options):
    """Bytes of ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zipped(data, name='archive/data.pkl', compress=zipfile.ZIP_STORED, **records):
    """A file as torch's around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', compress) as archive:
        archive.writestr(name, data)
        for key, value in records.items():
            archive.writestr(f'archive/data/{key[1:]}', value)
    return buffer.getvalue()


def old(data):
    """A file as torch's before 1.6 around a pickle."""
    numbers = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION)
    info = dict(protocol_version=1001, little_endian=True, type_sizes={})
    start = b''.join(pickle.dumps(part, protocol=2) for part in (*numbers, info))
    return start + data + pickle.dumps([], protocol=2)


def tarred(**members):
    """A tar of a few small files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w', format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name.replace('_', 'ä' * 80 + '.'))  # has a header of its own
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def make_seeds():
    """Valid files, by what reads them."""
    content = runner_content()
    arrays = {'a.weight': np.ones((2, 3), 'f4'), 'b': ('name', np.arange(4.0))}
    tensors = dict(a=torch.ones(2, 3), b=torch.zeros(0, 4), c=torch.ones(5, dtype=torch.bfloat16))
    meta = dict(cae_mm=json.dumps(dict(encoder=dict(embed_dims=8, img_size=[8, 8]))))
    dalle = {f'blocks.{name}': torch.ones(2, 3, 1, 1) for name in ('input.w', 'output.conv.w')}
    seeds = {
        'zip': [(saved(content, pickle_protocol=p), '.pth') for p in (2, 4)],
        'old': [
            (saved(content, pickle_protocol=p, _use_new_zipfile_serialization=False), '.pth')
            for p in (2, 3)
        ],
        'paddle': [(pickle.dumps(arrays, protocol=p), '.pdparams') for p in range(6)],
        'safetensors': [(save(tensors, metadata=meta), '.safetensors')],
        'convert': [(save(tensors | {'cls_token': torch.ones(1, 1, 8)}), '.safetensors')],
        'dalle': [(saved(dalle), '.pkl')],
        'tar': [(tarred(a_jpg=b'x' * 700, a_cls=b'3', b_png=b'y' * 10), '.tar')],
    }
    return seeds


def mutate(rng, data):
    """Damage some bytes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 30))
        other = rng.randrange(len(data) + 1)
        change = rng.randrange(7)
        if change == 0:
            del data[place:]
        elif change == 1:
            del data[place : place + length]
        elif change == 2:
            data[place:place] = data[other : other + length]
        elif change == 3:
            data[place : place + length] = rng.randbytes(length)
        elif change == 4:
            number = rng.choice(SPECIAL)
            size = rng.choice((1, 2, 4, 8))
            order = rng.choice(('little', 'big'))
            data[place : place + size] = (number % 256**size).to_bytes(size, order)
        elif change == 5 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        else:
            data[place : place + length] = data[other : other + length]
        if not data:
            break
    return bytes(data)


def mutate_inside(rng, data):
    """Damage the pickle of a file of torch; the archive around it stays whole."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, record in records.items():
            archive.writestr(name, mutate(rng, record) if name.endswith('.pkl') else record)
    return buffer.getvalue()


def mutate_header(rng, data):
    """Change numbers and words of the header of a safetensors file, whose length stays true."""
    (length,) = struct.unpack('<Q', data[:8])
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([key for key in header if key != '__metadata__'])
    entry = header[name]
    change = rng.randrange(6)
    if change == 0:
        key = rng.choice(('shape', 'data_offsets'))
        entry[key][rng.randrange(len(entry[key]))] = rng.choice(
            (*SPECIAL, -1, -(2**63), 1.5, 'a', None)
        )
    elif change == 1:
        entry['shape'] = rng.choice(
            ([], [2**40, 0], [0, 2**60], [1] * 500, [[1]], {}, [2**32, 2**32])
        )
    elif change == 2:
        entry['dtype'] = rng.choice(('F64', 'U8', 'BOOL', 'F8_E4M3', 'Q', '', 3))
    elif change == 3:
        header[f'{name}2'] = dict(entry)  # the same bytes twice
    elif change == 4:
        described = rng.choice(
            ('[' * 100_000, '{"encoder": [1]}', '{"encoder": {"depth": 1e99}}', '{')
        )
        header['__metadata__'] = rng.choice(({'cae_mm': described}, {'cae_mm': 1}, [], 'x'))
    else:
        header[name] = rng.choice((None, [], {}, 'x', {'dtype': 'F32'}))
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data[8 + length :]


# calls, states, items, tuples, marks, memo and all that works on what lies on the stack
STEPS = b'R )R \x85R \x86R \x87R b a s 0 2 ( t l d e u \x90 \x91 \x81 \x94 q\0 h\0 Q \x93'.split(
    b' '
)


def random_program(rng):
    """A pickle of random instructions, whose names are of what is known or what is dangerous."""
    names = [name.rpartition('.')[::2] for name in KNOWN] + [t.split() for t in TARGETS]
    names = [(module, name) for module, name in names]
    known = names[: len(KNOWN)]

    def text(value):
        data = value.encode()
        return pickle.BINUNICODE + struct.pack('<I', len(data)) + data

    def number():
        value = rng.choice((*SPECIAL[:6], rng.randrange(9), -1, 2**40))
        data = value.to_bytes(16, 'little', signed=True)
        return pickle.LONG1 + b'\x10' + data

    def name():
        module, last = rng.choice(known if rng.random() < 0.95 else names)
        return pickle.GLOBAL + f'{module}\n{last}\n'.encode()

    def storage():
        module, last = rng.choice([n for n in known if n[1].endswith('Storage')])
        kind = pickle.GLOBAL + f'{module}\n{last}\n'.encode()
        values = text('storage') + kind + text(rng.choice('01')) + text('cpu') + number()
        return pickle.MARK + values + pickle.TUPLE + pickle.BINPERSID

    def values():
        kinds = (
            number,
            name,
            name,
            storage,
            lambda: text(rng.choice(('f8', 'O', '<', 'a', '__x'))),
        )
        plain = (
            b'N',
            b'\x88',
            b']',
            b'}',
            b')',
            b'\x8f',
            b'C\x04abcd',
            b'U\x02f4',
            b'G' + b'@' * 8,
        )
        return rng.choice((*kinds, *(lambda p=p: p for p in plain)))()

    parts = [b'\x80\x04']
    for _ in range(rng.randrange(2, 40)):
        parts.append(values())
        if rng.random() < 0.7:
            parts.append(rng.choice(STEPS))
    return b''.join(parts) + b'.'


def dangerous():
    """Pickles that execute when torch or pickle read them, in each protocol and by each way."""
    for target in TARGETS:
        module, name = target.split()
        named, stacked = f'{module}\n{name}\n'.encode(), b''
        for word in (module, name):
            stacked += pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode()
        argument = b"(S'true'\nt"
        yield b'c' + named + argument + b'R.'
        yield b"(S'true'\ni" + named + b'.'
        yield b'(c' + named + b"S'true'\no."
        yield b'\x80\x02c' + named + argument + b'\x81.'
        yield b'\x80\x04' + stacked + b'\x93' + argument + b'R.'
        yield b'\x80\x04' + stacked + b'\x93' + argument + b'}\x92.'
        yield (
            b'\x80\x04cargparse\nNamespace\n)\x81}X\x06\x00\x00\x00appendc'
            + named
            + b'sb'
            + b"S'a'\na."
        )
        yield b'cbuiltins\ngetattr\n(c' + named + b"S'__call__'\ntR."
    for protocol in range(6):
        for function, argument in ((os.system, 'true'), (exec, '1'), (eval, '1'), (os.mkdir, '/x')):
            yield pickle.dumps({'a': [Call(function, argument)]}, protocol=protocol)
    for code in (b'\x82\x01', b'\x83\x01\x00', b'\x84\x01\x00\x00\x00'):
        yield b'\x80\x02' + code + b'.'


def bombs():
    """Small pickles that would take much memory, or time, or the stack."""
    # 60 tuples, each of the one before it twice
    laugh = b')q\x000' + b''.join(b'h%ch%c\x86q%c0' % (i, i, i + 1) for i in range(60)) + b'h\x3c'
    deep = b')' + b'\x85' * 150_000  # a tuple in a tuple in a tuple...
    for nested in (laugh, deep):
        yield b'\x80\x02' + nested + b')R.'  # named in an error
        yield b'\x80\x02' + nested + b'}b.'
        yield b'\x80\x02cnumpy\ndtype\n' + nested + b'\x85R.'
        yield b'\x80\x02cbuiltins\nset\n](' + nested + b'e\x85R.'  # hashed
        yield b'\x80\x02ccollections\nOrderedDict\n](](' + nested + b'Nee\x85R.'
        yield b'\x80\x02}' + nested + b'Ns.'
        yield b'\x80\x02}(' + nested + b'Nu.'
        yield b'\x80\x02(' + nested + b'Nd.'
        yield b'\x80\x04\x8f(' + nested + b'\x90.'
        yield b'\x80\x04(' + nested + b'\x91.'
        yield b'\x80\x02' + nested + b'Q.'  # key of a storage
    yield b'\x80\x02' + b']' * 50_000 + b'a' * 49_999 + b'.'
    module = b"cdall_e.utils\nConv2d\n)\x81q%c}(S'_parameters'\n}S'_modules'\n}"
    tree = module % 0 + b'ub0'  # of modules, as of tuples
    for i in range(60):
        tree += module % (i + 1) + b"(S'a'\nh%cS'b'\nh%cuub0" % (i, i)
    yield b'\x80\x02' + tree + b'h\x3c.'
    for code in (b'\x96', b'\x8d', b'\x8e', b'\x95'):
        for size in (2**62, 2**40, 4 * 2**30):
            yield b'\x80\x05' + code + struct.pack('<Q', size) + b'x.'
    yield b'\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xff.'
    yield b'I' + b'9' * 1_000_000 + b'\n.'
    yield b'L' + b'9' * 1_000_000 + b'L\n.'
    many = b'\x80\x02](' + b'N' * 100_000 + b'eq\x000'
    for name in (b'builtins\ntuple', b'builtins\nset', b'collections\nOrderedDict'):
        yield many + b'](' + b'c%s\n(h\x00tR' % name * 10_000 + b'e.'  # copied again and again
    text = b'\x80\x02X\x00\x00\x10\x00' + b'x' * 2**20 + b'q\x000'
    yield text + b'](' + b"c_codecs\nencode\n(h\x00S'latin1'\ntR" * 10_000 + b'e.'


def tensors():
    """Pickles of tensors that lie about their memory."""
    big, huge = 2**40, 2**62
    shapes = [
        (0, (big,), (0,)), (0, (4, huge), (1, 0)), (0, (huge, 4), (huge, 1)),
        (0, (2, 2), (2**63 - 1, 2)),
        (0, (2,), (2**61,)), (4, (1,), (1,)), (-1, (1,), (1,)), (0, (-1,), (1,)), (0, (2,), (-1,)),
        (0, (0, big), (1, 1)), (0, (big, 0), (1, 1)), (huge, (0,), (1,)), (0, (5,), (1,)),
        (0, (2,) * 70, (0,) * 70), (0, (1,) * 100_000, (0,) * 100_000), (0, (2,), ()),
        (0, (True,), (1,)),
        (0, (1.5,), (1,)), (0, ([1], 10**9), (1, 1)), (0, ('a',), (1,)), (0, None, None),
    ]  # fmt: skip
    storage = (
        ('0', 4),
        ('0', 0),
        ('0', big),
        ('0', -1),
        ('0', huge),
        ('1', 4),
        ((1,), 4),
        ('0', '4'),
    )

    class Memory:
        """What a file of torch names by a persistent id."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, thing):
            return thing.pid if isinstance(thing, Memory) else None

    def dump(key, length, *rest):
        memory, buffer = Memory(), io.BytesIO()
        memory.pid = ('storage', torch.FloatStorage, key, 'cpu', length)
        call = Call(torch._utils._rebuild_tensor_v2, memory, *rest, False, OrderedDict())
        Pickler(buffer, protocol=2).dump({'a': call})
        return buffer.getvalue()

    for key, length in storage:
        yield dump(key, length, 0, (4,), (1,))
    for shape in shapes:
        yield dump('0', 4, *shape)


def whole_files():
    """Files that are bombs as a whole, with their suffixes."""
    zeros = bytes(64 * 2**20)
    for level in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield zipped(zeros, compress=level), '.pth'
    plain = zipped(b'N.', _0=b'x' * 16)
    for number in (2**31, 2**32 - 2):  # sizes that the central directory lies about
        places = [i for i in range(len(plain)) if plain.startswith(b'PK\x01\x02', i)]
        for place in places:
            for offset in (20, 24, 42):
                data = bytearray(plain)
                data[place + offset : place + offset + 4] = struct.pack('<I', number)
                yield bytes(data), '.pth'
    many = io.BytesIO()
    with zipfile.ZipFile(many, 'w') as archive:
        archive.writestr('a/data.pkl', b'N.' * 500_000)
        for i in range(200):
            archive.writestr(f'a/data/{i}', b'')
    data = bytearray(many.getvalue())
    first = data.index(b'PK\x01\x02')
    for place in range(first, len(data)):  # all records are the first one
        if data.startswith(b'PK\x01\x02', place):
            data[place + 16 : place + 28] = data[first + 16 : first + 28]
            data[place + 42 : place + 46] = bytes(4)
    yield bytes(data), '.pth'
    for length in (0, 1, 7, 2**20, 2**32, 2**62, 2**63, 2**64 - 1):
        yield struct.pack('<Q', length) + b'{}', '.safetensors'
    for header in (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],'
        b'"data_offsets":[0,4]}}',
        b'[' * 200_000,
        b'{"a":' * 200_000,
        b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}',
        b'null',
        b'\xff\xfe',
    ):
        yield struct.pack('<Q', len(header)) + header + bytes(4), '.safetensors'
    for size in (b'\x80' + b'\xff' * 11, b'\xff' * 12, b'77777777777\x00'):
        data = bytearray(tarred(a_jpg=b'x'))
        for start in range(0, len(data), 512):
            if data[start + 257 : start + 262] == b'ustar':
                data[start + 124 : start + 136] = size
                data[start + 148 : start + 156] = b' ' * 8
                total = b'%06o\0 ' % sum(data[start : start + 512])
                data[start + 148 : start + 156] = total
        yield bytes(data), '.tar'
    yield b'\x93NUMPY', '.npz'


def damaged_index(rng, folder):
    """An index of shards with other numbers, or other bytes."""
    (folder / INDEX_FILE).unlink(missing_ok=True)
    load_index(folder)
    data = (folder / INDEX_FILE).read_bytes()
    if rng.random() < 0.5:
        return mutate(rng, data) if rng.random() < 0.8 else data
    with np.load(io.BytesIO(data)) as arrays:
        shards, images = arrays['shards'], arrays['images']
    column = rng.choice(images.dtype.names[1:])
    images[column] = rng.choice(
        (-1, 2**31 - 1, -(2**31)) if column != 'offset' else (-1, 2**63 - 1)
    )
    buffer = io.BytesIO()
    save = rng.choice((np.savez, np.savez_compressed))
    save(buffer, shards=shards, images=rng.choice((images, images[:0], images.tolist())))
    return buffer.getvalue()


def read_shards(path):
    """List a shard, and read all its images."""
    folder = path.parent
    index = load_index(folder)
    files = ShardFiles([str(folder / name) for name in index.shards['name']])
    for image in index.images:
        files.read(image['shard'], image['offset'], image['size'])


def convert(path):
    """Read as weights of another project."""
    return convert_checkpoint(path, path.parent / 'out')


def dalle(path):
    """Read as a tokenizer."""
    return convert_dalle(path, path.parent / 'out')


READERS = {
    'zip': read_checkpoint, 'old': read_checkpoint, 'safetensors': read_checkpoint,
    'paddle': read_paddle, 'convert': convert, 'dalle': dalle, 'pickle': read_plain_pickle,
    'tar': read_shards, 'index': read_shards,
}  # fmt: skip
SUFFIXES = {'.pth': 'zip', '.safetensors': 'safetensors', '.tar': 'tar', '.npz': 'index'}


def in_formats(program):
    """A pickle in each format that has one."""
    return [
        ('pickle', zipped(program), '.pth'),
        ('pickle', old(program), '.pth'),
        ('paddle', program, '.pdparams'),
        ('dalle', zipped(program), '.pkl'),
    ]


def make_cases(rng, count, folder):
    """Yields what reads it, the file's bytes and its suffix."""
    seeds = make_seeds()
    for kind, files in seeds.items():
        for data, suffix in files:
            yield kind, data, suffix
    step = 1 if count > 1000 else 199  # bytes between the places where files are cut off
    for kind, files in seeds.items():
        for data, suffix in files[:2]:
            yield from ((kind, data[:end], suffix) for end in range(0, len(data), step))
    yield from ((SUFFIXES[suffix], data, suffix) for data, suffix in whole_files())
    for program in dangerous():
        yield from in_formats(program)
    for i, program in enumerate(bombs()):  # each in one of them, as they take a second
        yield in_formats(program)[i % 4]
    for program in tensors():
        yield 'zip', zipped(program, _0=bytes(16)), '.pth'
        yield 'old', old(program), '.pth'
    kinds = [*seeds, 'inside', 'header', 'program', 'program', 'index']
    for i in range(count):
        kind = kinds[i % len(kinds)]
        if kind == 'inside':
            data, suffix = rng.choice(seeds['zip'] + seeds['dalle'])
            yield ('dalle' if suffix == '.pkl' else 'zip'), mutate_inside(rng, data), suffix
        elif kind == 'header':
            kind = rng.choice(('safetensors', 'convert'))
            yield kind, mutate_header(rng, seeds[kind][0][0]), '.safetensors'
        elif kind == 'program':
            program = random_program(rng)
            yield rng.choice(
                (('pickle', zipped(program, _0=bytes(64)), '.pth'), ('paddle', program, '.pd'))
            )
        elif kind == 'index':
            yield 'index', damaged_index(rng, folder / 'index'), '.npz'
        else:
            data, suffix = rng.choice(seeds[kind])
            yield kind, mutate(rng, data), suffix


def place(folder, kind, suffix):
    """Where a file of this kind is looked for."""
    if kind in ('tar', 'index'):
        return folder / kind / ('a.tar' if kind == 'tar' else INDEX_FILE)
    return folder / f'file{suffix}'


def run(folder, seed, count):
    """Read all of them; return counts, peak of memory and the longest time."""
    rng = random.Random(seed)
    shards = dict(a_jpg=b'x' * 700, a_cls=b'3', b_png=b'y' * 10)
    for name in ('tar', 'index', 'out'):
        (folder / name).mkdir(parents=True)
    (folder / 'index/a.tar').write_bytes(tarred(**shards))
    for kind, files in make_seeds().items():  # so that everything is imported
        for data, suffix in files:
            path = place(folder, kind, suffix)
            path.write_bytes(data)
            try:
                READERS[kind](path)
            except ValueError as error:
                assert kind in ('convert', 'dalle'), error
    watch(folder)
    try:
        return read_all(folder, make_cases(rng, count, folder))
    finally:
        WATCHING.clear()


def read_all(folder, cases):
    """Read each; see ``run``."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results, slowest = Counter(), 0.0
    for kind, data, suffix in cases:
        path = place(folder, kind, suffix)
        path.write_bytes(data)
        if kind == 'index':
            os.utime(path, (2**31, 2**31))  # newer than the shards
        start = time.monotonic()
        faulthandler.dump_traceback_later(SECONDS, exit=True)  # also out of loops in C
        try:
            READERS[kind](path)
            results[f'{kind} read'] += 1
        except (ValueError, OSError) as error:
            assert str(path) in str(error), f'{kind}: {error!r} does not name the file'
            results[f'{kind} refused'] += 1
        finally:
            faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, time.monotonic() - start)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown < MEGABYTES, f'{kind}: {grown:.0f} MB more'
    return dict(results=results, megabytes=round(grown), slowest=round(slowest, 2))


if __name__ == '__main__':
    print(json.dumps(run(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))))
