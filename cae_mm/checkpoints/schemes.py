"""Make mmengine read every checkpoint of this process as plain data, whoever asks for it.

mmengine's own loaders execute the pickle of a file that torch refuses to read as data, and all of
mmpretrain, mmseg and mmdet goes through them: models, inferencers, ``init_cfg``, Runners. Importing
this module puts others in their place, by mmengine's extension point for that; ``cae_mm.registry``
imports it with its package, so that whatever makes models of this project known does it too.
"""

import logging
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier
from mmengine.logging import print_log
from mmengine.runner import checkpoint as published
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.utils import apply_to

from cae_mm.checkpoints.files import read_content

Place = str | torch.device | None


@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_plain(filename: str, map_location: Place = None) -> Any:
    """Read a file, onto the CPU or the device that is named.

    The text of a config that a Runner wrote into it is left out, since mmengine runs it when it
    resumes, or when an inferencer is given a file alone.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'{path} can not be found.')
    content = read_content(path)
    if _drop_configs(content):
        text = f'{path}: the text of its config is left out, because it would be run'
        print_log(text, logger='current', level=logging.INFO)
    if not isinstance(map_location, str | torch.device) or torch.device(map_location).type == 'cpu':
        return content
    return apply_to(content, torch.is_tensor, lambda tensor: tensor.to(map_location))


def _drop_configs(content: Any) -> list[str]:
    """Remove and return what mmengine takes for a config."""
    places = [('meta',), ('message_hub', 'runtime_info')]
    texts = []
    for place in places:
        found = content
        for key in place:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict):
            texts += [found.pop(key) for key in ('cfg', 'config') if key in found]
    return texts


@CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), force=True)
def load_from_web(filename: str, map_location: Place = None) -> Any:
    """Download a file, once, to where torch keeps such files, and read it."""
    name = Path(urlparse(filename).path).name
    if name in ('', '..'):
        raise ValueError(f'{filename} names no file')
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    path = folder / name
    try:
        if os.environ.get('LOCAL_RANK', '0') == '0' and not path.exists():  # once on a machine
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(filename, str(path))
    finally:  # others that wait for the file miss it, if that failed
        barrier()
    return load_from_plain(str(path), map_location)


@CheckpointLoader.register_scheme(prefixes=('modelzoo://', 'torchvision://'), force=True)
def load_from_torchvision(filename: str, map_location: Place = None) -> Any:
    """Load what torchvision has published under a name."""
    name = filename.partition('://')[2]
    return load_from_web(published.get_torchvision_models()[name], map_location)


@CheckpointLoader.register_scheme(prefixes=('open-mmlab://', 'openmmlab://'), force=True)
def load_from_openmmlab(filename: str, map_location: Place = None) -> Any:
    """Load what OpenMMLab has published under a name, or a file of mmengine's own folder."""
    name = filename.partition('://')[2]
    name = published.get_deprecated_model_names().get(name, name)
    url = published.get_external_models()[name]
    if url.startswith(('http://', 'https://')):
        return load_from_web(url, map_location)
    return load_from_plain(str(Path(published._get_mmengine_home(), url)), map_location)


@CheckpointLoader.register_scheme(prefixes='mmcls://', force=True)
def load_from_mmcls(filename: str, map_location: Place = None) -> Any:
    """Load a backbone of mmpretrain's predecessor."""
    url = published.get_mmcls_models()[filename.partition('://')[2]]
    return published._process_mmcls_checkpoint(load_from_web(url, map_location))


@CheckpointLoader.register_scheme(
    prefixes=('pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), force=True
)
def load_from_elsewhere(filename: str, *_: Any) -> Any:
    """Refuse storage whose files could not be read as plain data without being fetched first."""
    raise ValueError(f'{filename} is not loaded from there: download it and give the path')
