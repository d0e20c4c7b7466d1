"""Read and write weights as plain data: nothing in a file is ever executed."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from cae_mm.checkpoints.description import KEY, EncoderDescription
from cae_mm.checkpoints.unpickler import read_plain_pickle, refusing
from cae_mm.checkpoints.whole import write_whole


@dataclass
class Checkpoint:
    """A file that was read, or what is to become one."""

    path: Path
    content: Any  # of torch.save; a safetensors file is given the form of a Runner's checkpoint
    # the weights: a nested 'state_dict' (mmengine) or 'model' (official code), or all of it
    state: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Find the weights, or raise a ValueError."""
        state = self.content
        for key in ('state_dict', 'model'):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
        if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
            raise ValueError(f'{self.path} holds no state dict (a dict of tensors)')
        self.state = state

    @property
    def metadata(self) -> dict[str, Any]:
        """What this project wrote beside them: 'encoder'; 'source', 'part', 'neck' if converted."""
        meta = self.content.get('meta')
        metadata = meta.get(KEY) if isinstance(meta, dict) else None
        return metadata if isinstance(metadata, dict) else {}

    @property
    def description(self) -> EncoderDescription | None:
        """Of the encoder in it, None if the file does not tell."""
        if 'encoder' not in self.metadata:
            return None
        try:
            return EncoderDescription.from_dict(self.metadata['encoder'])
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f'{self.path} describes its encoder wrongly: {error}') from error


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a ``.safetensors`` file, or anything of ``torch.save`` without executing its pickle.

    Raises:
        ValueError: If the file needs code to be run, is broken or holds no state dict.
    """
    return Checkpoint(Path(path), read_content(Path(path)))


def read_content(path: Path) -> Any:
    """Read what such a file holds, whether or not it is weights."""
    if path.suffix != '.safetensors':
        return read_plain_pickle(path)
    with refusing(path):
        with safe_open(path, 'pt') as file:
            metadata = json.loads((file.metadata() or {}).get(KEY, '{}'))
        return {'state_dict': load_file(path), 'meta': {KEY: metadata}}


def write_safetensors(
    path: Path, state: dict[str, Tensor], metadata: dict[str, Any] | None = None
) -> None:
    """Write tensors and metadata; the file appears when it is complete, with its folder."""
    header = {'format': 'pt'} | ({KEY: json.dumps(metadata)} if metadata else {})
    write_whole(path, save({k: v.contiguous() for k, v in state.items()}, metadata=header))
