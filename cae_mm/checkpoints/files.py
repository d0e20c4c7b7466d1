"""Read and write weights as plain data: nothing in a file is ever executed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from cae_mm.checkpoints.description import KEY, EncoderDescription
from cae_mm.checkpoints.unpickler import read_plain_pickle


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
    content = read_plain_pickle(path)
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
    return parse_description(get_metadata(read_plain_pickle(path)), path)


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
