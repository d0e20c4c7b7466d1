"""What the checks look at: a config, the machine it is for, and what can be built from it."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, MODELS, TRANSFORMS, DefaultScope, Registry
from mmengine.runner import Runner
from torch import nn

from cae_mm.models import CAE, CAEViT

LEVELS = ('error', 'warning', 'note')
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
OPTIONAL_SCOPES = ('mmseg', 'mmdet')
RUNNER_KEYS = (*signature(Runner.__init__).parameters, 'auto_scale_lr')
MAX_VALUE_LENGTH = 60


class Finding(NamedTuple):
    """Something that a check noticed, and the way out."""

    level: str  # one of LEVELS
    key: str  # place in the config, with dots
    text: str
    remedy: str
    value: str = ''  # what stands there


@dataclass(frozen=True)
class Machine:
    """What a run is going to have.

    Attributes:
        processes: Number of processes, one per GPU.
        cuda: Whether there are GPUs.
        bf16: Whether they compute in bfloat16 (compute capability 8 and above).
    """

    processes: int = 1
    cuda: bool = False
    bf16: bool = True

    @classmethod
    def detect(cls, gpus: int | None = None) -> 'Machine':
        """Take what is said, else WORLD_SIZE, else the GPUs that torch sees, else one CPU.

        GPUs that are said but cannot be seen are taken for ones with bfloat16.
        """
        seen = torch.cuda.device_count()
        if gpus is None:
            processes = int(os.environ.get('WORLD_SIZE', seen or 1))
            cuda = seen > 0
        else:
            processes, cuda = max(gpus, 1), gpus > 0
        bf16 = all(torch.cuda.get_device_capability(i)[0] >= 8 for i in range(seen))
        return cls(processes, cuda, bf16)

    def __str__(self) -> str:
        one, many = ('GPU', 'GPUs') if self.cuda else ('CPU process', 'CPU processes')
        return f'{self.processes} {one if self.processes == 1 else many}'


@dataclass(frozen=True)
class Case:
    """A config with what the checks need to know of it.

    Attributes:
        path: The config file.
        cfg: Its content, with the options of the command line.
        written: Its content alone.
        machine: What it is going to run on.
        checkpoint: The checkpoint of the command line, if any.
    """

    path: Path
    cfg: ConfigDict
    written: ConfigDict
    machine: Machine
    checkpoint: Path | None = None

    @classmethod
    def read(
        cls, path: Path, machine: Machine, options: dict[str, Any], checkpoint: Path | None
    ) -> 'Case':
        """Read the config file, which like any config runs as a program."""
        cfg = Config.fromfile(path)
        written = deepcopy(cfg._cfg_dict)
        cfg.merge_from_dict(options)
        return cls(path, cfg._cfg_dict, written, machine, checkpoint)

    def get(self, key: str, default: Any = None) -> Any:
        """Value at a key with dots."""
        return get(self.cfg, key, default)

    def found(self, level: str, key: str, text: str, remedy: str) -> Finding:
        """A finding about what stands at ``key``."""
        return Finding(level, key, text, remedy, shorten(self.get(key)))

    @property
    def scope(self) -> str:
        """Where types without prefix are looked for."""
        return self.cfg.get('default_scope') or 'mmengine'

    @cached_property
    def typed(self) -> list[tuple[str, dict[str, Any]]]:
        """All dicts with a type in what the Runner takes, with their keys."""
        return [
            pair
            for key, value in self.cfg.items()
            if key in RUNNER_KEYS
            for pair in walk(value, key)
        ]

    @cached_property
    def unusable_scopes(self) -> dict[str, Exception]:
        """Optional packages that the config names and that cannot be imported here."""
        prefixes = {self.scope, *(str(node['type']).partition('.')[0] for _, node in self.typed)}
        errors: dict[str, Exception] = {}
        for scope in OPTIONAL_SCOPES:
            if scope in prefixes:
                try:
                    with quiet():
                        import_module(f'{scope}.models')
                except Exception as error:  # a broken binary raises almost anything
                    errors[scope] = error
        return errors

    @cached_property
    def built(self) -> nn.Module | Exception | None:
        """The model on the meta device, or why it cannot be built; None if nothing was tried."""
        if not self.cfg.get('model') or self.unusable_scopes:
            return None
        cfg = deepcopy(self.cfg['model'])
        if self.cfg.get('data_preprocessor'):  # as the Runner does
            cfg.setdefault('data_preprocessor', deepcopy(self.cfg['data_preprocessor']))
        with torch.device('meta'):
            return self.build(MODELS, cfg)

    @property
    def model(self) -> nn.Module | None:
        """The model on the meta device, if it can be built."""
        return self.built if isinstance(self.built, nn.Module) else None

    @property
    def encoder(self) -> CAEViT | None:
        """The backbone, if it is ours."""
        backbone = getattr(self.model, 'backbone', None)
        return backbone if isinstance(backbone, CAEViT) else None

    @property
    def pretrains(self) -> bool:
        """Whether the model is ``CAE`` itself."""
        return isinstance(self.model, CAE)

    @cached_property
    def datasets(self) -> dict[str, dict[str, Any]]:
        """The datasets of all loaders without their wrappers, by key."""
        return {
            key: node
            for loader in LOADERS
            if self.get(f'{loader}.dataset')
            for key, node in _innermost(self.get(f'{loader}.dataset'), f'{loader}.dataset')
        }

    @cached_property
    def transforms(self) -> dict[str, Any]:
        """Each transform of each pipeline, built, or the exception that it raised, by key."""
        if self.unusable_scopes:
            return {}
        return {
            f'{key}.pipeline.{i}': self.build(TRANSFORMS, step)
            for key, node in self.datasets.items()
            for i, step in enumerate(node.get('pipeline') or [])
        }

    def build_dataset(self, node: dict[str, Any]) -> Any:
        """Build a dataset that reads nothing yet, or return the exception."""
        return self.build(DATASETS, node | dict(pipeline=[], lazy_init=True))

    def build(self, registry: Registry, cfg: dict[str, Any]) -> Any:
        """Build from a config as the Runner would, or return the exception."""
        return self.attempt(lambda: registry.build(ConfigDict(deepcopy(cfg))))

    def attempt(self, make: Callable[[], Any]) -> Any:
        """Call ``make`` quietly in the config's scope; return its result or the exception."""
        try:
            with quiet(), DefaultScope.overwrite_default_scope(self.scope):
                return make()
        except Exception as error:  # whatever a constructor raises
            return error


def get(node: Any, key: str, default: Any = None) -> Any:
    """Value at a key with dots, in dicts and lists."""
    for part in key.split('.'):
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list | tuple) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            return default
    return node


def walk(node: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All dicts with a type, outer ones first."""
    if isinstance(node, dict):
        if 'type' in node:
            yield key, node
        for name, value in node.items():
            yield from walk(value, f'{key}.{name}')
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from walk(value, f'{key}.{i}')


def shorten(value: Any) -> str:
    """One line of text for a value; of a dict with a type only that."""
    if value is None:
        return ''
    if isinstance(value, dict):
        return f'dict(type={value["type"]!r}, ...)' if 'type' in value else 'dict(...)'
    text = repr(value)
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 4] + ' ...'


@contextmanager
def quiet() -> Iterator[None]:
    """Keep logs and warnings of what is imported and built to itself."""
    logger = MMLogger.get_current_instance()  # has a cache that logging.disable does not reach
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def _innermost(node: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The datasets in wrappers such as RepeatDataset and ConcatDataset."""
    if isinstance(node.get('dataset'), dict):
        yield from _innermost(node['dataset'], f'{key}.dataset')
    elif isinstance(node.get('datasets'), list | tuple):
        for i, inner in enumerate(node['datasets']):
            yield from _innermost(inner, f'{key}.datasets.{i}')
    else:
        yield key, node
