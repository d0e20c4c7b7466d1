"""Turn the published weights of DALL-E's d-VAE into safetensors.

OpenAI publishes whole pickled modules, which torch can only open by running them with the package
``dall_e`` at hand. Here nothing is run: inert shells stand for the module classes, and a file that
names anything else is refused. mmpretrain's state dict ``dalle_encoder.pth`` is taken as well.

References:
    The pickled classes: https://github.com/openai/DALL-E/tree/master/dall_e
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cae_mm.checkpoints.files import write_safetensors
from cae_mm.checkpoints.pretrained import compare_keys, strip_prefix
from cae_mm.checkpoints.unpickler import Shell, read_plain_pickle
from cae_mm.models.targets import DALLEDecoder, DALLEEncoder

PUBLISHED = {'n_hid': 256, 'vocab_size': 8192, 'n_init': 128, 'blocks_per_group': 2}
NETWORKS: dict[str, Any] = {'encoder': DALLEEncoder, 'decoder': DALLEDecoder}
CLASSES = (
    'dall_e.encoder.Encoder',
    'dall_e.encoder.EncoderBlock',
    'dall_e.decoder.Decoder',
    'dall_e.decoder.DecoderBlock',
    'dall_e.utils.Conv2d',
    'torch.nn.modules.activation.ReLU',
    'torch.nn.modules.container.Sequential',
    'torch.nn.modules.linear.Identity',
    'torch.nn.modules.pooling.MaxPool2d',
    'torch.nn.modules.upsampling.Upsample',
)


class DALLEConversion(NamedTuple):
    """What came out."""

    part: str  # 'encoder' or 'decoder'
    sizes: dict[str, int]  # the arguments that build the network
    state: dict[str, Tensor]
    path: Path  # the file written


def convert_dalle(source: Path, out_dir: Path) -> DALLEConversion:
    """Read and check one file, and write ``dalle_encoder`` or ``dalle_decoder.safetensors``.

    Raises:
        ValueError: If the file needs code to be run, or names or shapes are not those of a DALL-E
            encoder or decoder.
    """
    state = _read_dalle(source)
    try:
        part, sizes = read_sizes(state)
        with torch.device('meta'):  # no memory for weights
            network = NETWORKS[part](**sizes)
    except (ArithmeticError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f'{source} holds no DALL-E network: {error!r}') from error
    match = compare_keys(network.state_dict(), state)
    if match.problems:
        raise ValueError(f'{source} is no DALL-E {part}: {match.explanation}')
    path = out_dir / f'dalle_{part}.safetensors'
    write_safetensors(path, state)
    return DALLEConversion(part, sizes, state, path)


def _read_dalle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a pickled module or of a state dict, under the names of the module."""
    content = read_plain_pickle(path, dict.fromkeys(CLASSES, Shell))
    try:
        if isinstance(content, Shell):
            content = _collect_tensors(content, '', set())
        content = content.get('state_dict', content.get('model', content))
        first = 'blocks.input.w'
        (prefix,) = [k.removesuffix(first) for k in content if k.endswith(first)]
        return {k: v.contiguous().clone() for k, v in strip_prefix(content, prefix).items()}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f'{path} holds no DALL-E encoder or decoder') from error


def _collect_tensors(module: Any, prefix: str, seen: set[int]) -> dict[str, Tensor]:
    """Do what ``nn.Module.state_dict`` does, for shells, none of which may occur twice."""
    if id(module) in seen:
        raise ValueError('a module inside itself, or twice')
    seen.add(id(module))
    attributes = vars(module)
    state = {prefix + k: v for k, v in attributes['_parameters'].items() if v is not None}
    for name, child in attributes['_modules'].items():
        state |= _collect_tensors(child, f'{prefix}{name}.', seen)
    return state


def read_sizes(state: dict[str, Tensor]) -> tuple[str, dict[str, int]]:
    """Tell from the shapes which part this is, and the arguments that build it."""
    n_first, n_in = state['blocks.input.w'].shape[:2]
    n_out, n_last = state['blocks.output.conv.w'].shape[:2]
    blocks = {key.split('.')[2] for key in state if key.startswith('blocks.group_1.block_')}
    sizes = {'blocks_per_group': len(blocks)}
    if n_in == 3:
        return 'encoder', {'n_hid': n_first, 'vocab_size': n_out} | sizes
    return 'decoder', {'n_init': n_first, 'n_hid': n_last, 'vocab_size': n_in} | sizes
