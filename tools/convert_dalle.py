"""Turn the published weights of DALL-E's d-VAE into safetensors: ``convert_dalle.py encoder.pkl``.

OpenAI publishes whole pickled modules, which torch can only open by running them with the package
``dall_e`` at hand. Here nothing is run: inert shells stand for the module classes, and a file that
names anything else is refused. mmpretrain's state dict ``dalle_encoder.pth`` is taken as well.

References:
    The pickled classes: https://github.com/openai/DALL-E/tree/master/dall_e
    Old file format: https://github.com/pytorch/pytorch/blob/v2.4.1/torch/serialization.py#L675
"""

import argparse
import hashlib
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from cae_mm.checkpoints.files import read_plain_pickle
from cae_mm.checkpoints.pretrained import compare_keys
from cae_mm.models.targets import DALLEDecoder, DALLEEncoder

PUBLISHED = {'n_hid': 256, 'vocab_size': 8192, 'n_init': 128, 'blocks_per_group': 2}
CLASSES = {
    'dall_e.encoder': ('Encoder', 'EncoderBlock'),
    'dall_e.decoder': ('Decoder', 'DecoderBlock'),
    'dall_e.utils': ('Conv2d',),
    'torch.nn.modules.activation': ('ReLU',),
    'torch.nn.modules.container': ('Sequential',),
    'torch.nn.modules.linear': ('Identity',),
    'torch.nn.modules.pooling': ('MaxPool2d',),
    'torch.nn.modules.upsampling': ('Upsample',),
}


class Shell:
    """Stands for a pickled class: takes its state into ``__dict__`` and does nothing else."""


SHELLS = [
    type(name, (Shell,), {'__module__': module})
    for module, names in CLASSES.items()
    for name in names
]


class OldUnpickler(pickle.Unpickler):
    """For whole modules in torch's format before 1.6, which its restricted unpickler cannot read.

    A file can name and call what is in ``known`` and no more; tensors are float32 views of
    ``storages``, which are filled afterwards.
    """

    known = {f'{shell.__module__}.{shell.__name__}': shell for shell in SHELLS} | {
        '__builtin__.set': set,
        'collections.OrderedDict': OrderedDict,
        'torch.FloatStorage': Shell,
        'torch.cuda.FloatStorage': Shell,
        'torch.device': lambda *_: None,
        'torch._utils._rebuild_parameter': lambda data, *_: data,
        'torch._utils._rebuild_tensor_v2': lambda flat, offset, size, stride, *_: flat.as_strided(
            size, stride, offset
        ),
    }

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Look the name up; nothing is imported."""
        if f'{module}.{name}' not in self.known:
            raise ValueError(f'it refers to {module}.{name}, which is not allowed there')
        return self.known[f'{module}.{name}']

    def persistent_load(self, pid: Any) -> Any:
        """Give the class of ('module', class, file, source), or an empty storage."""
        if pid[0] == 'module':
            return pid[1]
        _, _, key, _, numel, _ = pid
        return self.storages.setdefault(key, torch.zeros(numel))


def read_old_format(path: Path) -> Any:
    """Read magic number, version, machine, object, keys of storages, and then their bytes."""
    try:
        with path.open('rb') as file:
            readers = [OldUnpickler(file) for _ in range(5)]
            *_, content, keys = [reader.load() for reader in readers]
            storages = readers[3].storages
            if set(keys) != storages.keys():
                raise ValueError('tensors without data or data without tensors')
            for key in keys:
                flat = storages[key]
                count = int.from_bytes(file.read(8), 'little')
                if count != flat.numel() or file.readinto(flat.numpy()) != flat.nbytes:
                    raise EOFError('it ends too early')
    except Exception as error:  # a pickle's bytes can raise anything
        reason = f'{path} was refused, nothing in it was executed: {error}'
        raise ValueError(reason) from error
    return content


def collect_tensors(module: Any, prefix: str = '') -> dict[str, Tensor]:
    """Do what ``nn.Module.state_dict`` does, for shells."""
    attributes = vars(module)
    state = {prefix + k: v for k, v in attributes['_parameters'].items() if v is not None}
    for name, child in attributes['_modules'].items():
        state |= collect_tensors(child, f'{prefix}{name}.')
    return state


def read_dalle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a pickled module or of a state dict, under the names of the module.

    Raises:
        ValueError: If the file is broken, would need code to be run, or is no DALL-E network.
    """
    magic = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
    with path.open('rb') as file:
        old = file.read(len(magic)) == magic
    if not old and not zipfile.is_zipfile(path):
        raise ValueError(f'{path} is no complete file of torch.save: download it again')
    content = read_old_format(path) if old else read_plain_pickle(path, [*SHELLS, set])
    try:
        if isinstance(content, Shell):
            content = collect_tensors(content)
        content = content.get('state_dict', content.get('model', content))
        first = 'blocks.input.w'
        (prefix,) = [k.removesuffix(first) for k in content if k.endswith(first)]
        inside = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
        return {k: v.detach().contiguous().clone() for k, v in inside.items()}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f'{path} holds no DALL-E encoder or decoder') from error


def read_sizes(state: dict[str, Tensor]) -> tuple[str, dict[str, int]]:
    """Tell from the shapes which part this is, and the arguments that build it."""
    n_first, n_in = state['blocks.input.w'].shape[:2]
    n_out, n_last = state['blocks.output.conv.w'].shape[:2]
    blocks = {key.split('.')[2] for key in state if key.startswith('blocks.group_1.block_')}
    sizes = {'blocks_per_group': len(blocks)}
    if n_in == 3:
        return 'encoder', {'n_hid': n_first, 'vocab_size': n_out} | sizes
    return 'decoder', {'n_init': n_first, 'n_hid': n_last, 'vocab_size': n_in} | sizes


def _list(sizes: dict[str, int]) -> str:
    return ', '.join(f'{name} {size}' for name, size in sizes.items())


def convert(source: Path, out_dir: Path) -> None:
    """Read, check, write and report one file.

    Raises:
        ValueError: If names or shapes are not those of a DALL-E encoder or decoder.
    """
    state = read_dalle(source)
    try:
        part, sizes = read_sizes(state)
        with torch.device('meta'):  # no memory for weights
            model = {'encoder': DALLEEncoder, 'decoder': DALLEDecoder}[part](**sizes)
    except (ArithmeticError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f'{source} holds no DALL-E network: {error!r}') from error
    problems = compare_keys(model.state_dict(), state).problems
    if problems:
        raise ValueError(f'{source} is no DALL-E {part}: {"; ".join(problems)}')

    out_dir.mkdir(parents=True, exist_ok=True)
    target = out_dir / f'dalle_{part}.safetensors'
    data = save(state, metadata={'format': 'pt'})
    unfinished = target.with_suffix('.unfinished')
    try:
        unfinished.write_bytes(data)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)

    print(f'{source}: DALL-E {part}, {len(state)} tensors')
    print('  ' + _list(sizes))
    if any(PUBLISHED[name] != size for name, size in sizes.items()):
        print(f'  not the published network, which has {_list(PUBLISHED)}')
    print(f'  {target}: {len(data)} bytes\n  sha256 {hashlib.sha256(data).hexdigest()}')


def main(argv: list[str] | None = None) -> int:
    """Convert each file; the first bad one ends it with status 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('sources', nargs='+', type=Path, metavar='SOURCE')
    parser.add_argument('--out-dir', type=Path, default=Path('cae_ckpt'))
    args = parser.parse_args(argv)
    try:
        for source in args.sources:
            convert(source, args.out_dir)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
