"""Trained models for inference: strictly loaded, and nothing is run but the config.

In short::

    model = init_model(CONFIG, CHECKPOINT)    # for mmpretrain.ImageClassificationInferencer(model),
                                              # mmseg.apis.inference_model(model, images),
                                              # mmdet.apis.inference_detector(model, images)
    infer = init_inferencer(CONFIG, CHECKPOINT)  # that of mmpretrain, mmseg or mmdet
"""

from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import nn

from cae_mm.checkpoints.files import Checkpoint, read_checkpoint
from cae_mm.checkpoints.pretrained import find_file, log_match, match_weights
from cae_mm.engine.cli import load_config

INFERENCERS = {
    'mmpretrain': 'ImageClassificationInferencer',
    'mmseg': 'MMSegInferencer',
    'mmdet': 'DetInferencer',
}


def init_model(
    config: str | Path | Config, checkpoint: str | Path, device: str | None = None
) -> nn.Module:
    """Build the model of a config and load a checkpoint, of which it needs every tensor.

    Args:
        config: Of a classifier, segmentor or detector: its file, or what ``load_config`` returns.
            It runs as a program.
        checkpoint: A Runner's file, a state dict or safetensors; it is read as plain data.
        device: None for the first GPU, or the CPU if there is none.

    Returns:
        The model in eval mode, with what inference looks for: its config, and the names and
        colours of its classes, the file's before the config's.

    Raises:
        ValueError: If the file lacks a tensor of the model or has it in another shape, or would
            have to be run.
    """
    cfg = deepcopy(config) if isinstance(config, Config) else load_config(config)
    init_default_scope(_find_scope(cfg))
    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    name = type(model).__name__
    file = read_checkpoint(find_file(checkpoint, name))
    match = match_weights(model, file, adapt=False)
    if match.missing or match.reshaped:
        raise ValueError(f'{file.path} does not fit {name}: {match.explanation}')
    model.load_state_dict(match.matched)
    log_match(model, match, file.path)
    model.cfg = model._config = cfg  # the latter names are mmpretrain's
    model.dataset_meta = model._dataset_meta = _describe_classes(cfg, file)
    model._metainfo = None
    return model.to(device or get_device()).eval()


def init_inferencer(
    config: str | Path | Config, checkpoint: str | Path, device: str | None = None, **options: Any
) -> Any:
    """Make the inferencer of mmpretrain, mmseg or mmdet around ``init_model``.

    Args:
        config: As of ``init_model``.
        checkpoint: As of ``init_model``.
        device: As of ``init_model``.
        options: Of ``ImageClassificationInferencer``, ``MMSegInferencer`` or ``DetInferencer``.
    """
    cfg = deepcopy(config) if isinstance(config, Config) else load_config(config)
    scope = _find_scope(cfg)
    kind: Any = getattr(import_module(f'{scope}.apis'), INFERENCERS[scope])
    if scope == 'mmpretrain':
        return kind(init_model(cfg, checkpoint, device), **options)

    cfg.visualizer.vis_backends = []  # which are for the pictures of a run

    class Inferencer(kind):
        def _init_model(self, cfg: Config, weights: str, device: str) -> nn.Module:
            return init_model(cfg, weights, device)

    return Inferencer(cfg, str(checkpoint), device=device, **options)


def _find_scope(cfg: Config) -> str:
    scope = cfg.get('default_scope')
    if scope not in INFERENCERS:
        raise ValueError(
            f'{cfg.filename}: a model for inference needs a default_scope of {[*INFERENCERS]}, not '
            f'{scope!r}'
        )
    if 'test_dataloader' not in cfg:
        raise ValueError(
            f'{cfg.filename} has no test_dataloader, as those of pretraining: a model for '
            'inference needs the config of its task'
        )
    return scope


def _test_dataset(cfg: Config) -> Any:
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # of a wrapper
        dataset = dataset.dataset
    return dataset


def _describe_classes(cfg: Config, file: Checkpoint) -> dict[str, Any]:
    """Return 'classes' and 'palette', as far as they are known."""
    meta = file.content.get('meta')
    meta = meta if isinstance(meta, dict) else {}
    meta = meta.get('dataset_meta', meta)  # CLASSES and PALETTE stood in meta before mmengine
    dataset = _test_dataset(cfg)
    with DATASETS.switch_scope_and_registry(None) as registry:
        of_class = getattr(registry.get(dataset.type), 'METAINFO', {})
    default = {'palette': 'random'} if cfg.default_scope == 'mmdet' else {}
    found: dict[str, Any] = {}
    for source in (default, of_class, dataset.get('metainfo') or {}, meta):
        found |= {k.lower(): v for k, v in source.items() if k.lower() in ('classes', 'palette')}
    return found
