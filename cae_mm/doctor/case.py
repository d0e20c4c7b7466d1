"""What the checks look at: a config, the machine it is for, and what can be built from it."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope, Registry

from cae_mm.doctor.finding import Finding
from cae_mm.engine.cli import RUNNER_KEYS, load_config
from cae_mm.engine.fitting import fit_batch
from cae_mm.engine.settings import LOADERS
from cae_mm.models import CAE, CAEDataPreprocessor, CAEViT

COMMAND_LINE = 'CHECKPOINT'
OPTIONAL_SCOPES = ('mmseg', 'mmdet')


@dataclass(frozen=True)
class Machine:
    """What a run is going to have: a number of processes, each on 'cuda' or 'cpu'."""

    processes: int = 1
    device: str = 'cpu'

    @classmethod
    def detect(cls, gpus: int | None = None) -> 'Machine':
        """Take what is said, else WORLD_SIZE, else the GPUs that torch sees, else one CPU."""
        if gpus is not None:
            return cls(max(gpus, 1), 'cuda' if gpus else 'cpu')
        seen = torch.cuda.device_count()
        return cls(int(os.environ.get('WORLD_SIZE', seen or 1)), 'cuda' if seen else 'cpu')

    def __str__(self) -> str:
        one, many = ('GPU', 'GPUs') if self.device == 'cuda' else ('CPU process', 'CPU processes')
        return f'{self.processes} {one if self.processes == 1 else many}'


@dataclass(frozen=True)
class Case:
    """A config with what the checks need to know of it.

    Attributes:
        cfg: The config with the options of the command line, fitted to the machine; the command
            line's checkpoint is at COMMAND_LINE.
        recipe: The config as it is written.
        machine: What it is going to run on.
    """

    cfg: ConfigDict
    recipe: ConfigDict
    machine: Machine

    @classmethod
    def read(
        cls, path: Path, machine: Machine, options: dict[str, Any], checkpoint: Path | None
    ) -> 'Case':
        """Read the config file, which like any config runs as a program."""
        cfg = load_config(path, options)
        if cfg.get('runner_type') == 'cae_mm.CAERunner':
            limit = get(cfg.get('settings'), 'cpu_batch_size')
            fit_batch(cfg, machine.processes, limit if machine.device == 'cpu' else None)
        if checkpoint is not None:
            cfg[COMMAND_LINE] = str(checkpoint)
        return cls(cfg._cfg_dict, load_config(path)._cfg_dict, machine)

    def get(self, key: str, default: Any = None) -> Any:
        """Value at a key with dots."""
        return get(self.cfg, key, default)

    def finding(self, level: str, key: str, text: str, remedy: str = '') -> Finding:
        """A finding about what stands at ``key``."""
        return Finding(level, key, text, remedy, self.get(key))

    @property
    def scope(self) -> str:
        """Where types without prefix are looked for."""
        return self.cfg.get('default_scope') or 'mmengine'

    @cached_property
    def typed(self) -> list[tuple[str, dict[str, Any]]]:
        """All dicts with a type in what the Runner takes, with their keys."""
        values = {key: value for key, value in self.cfg.items() if key in RUNNER_KEYS}
        return [pair for key, value in values.items() for pair in _walk(value, key)]

    @cached_property
    def unusable_scopes(self) -> dict[str, Exception]:
        """Optional packages that the config names and that cannot be imported here."""
        named = {self.scope, *(str(node['type']).partition('.')[0] for _, node in self.typed)}
        scopes = [scope for scope in OPTIONAL_SCOPES if scope in named]
        outcomes = {scope: self.attempt(import_module, f'{scope}.models') for scope in scopes}
        return {scope: e for scope, e in outcomes.items() if isinstance(e, Exception)}

    @cached_property
    def built(self) -> Any:
        """The model on the meta device, or why it cannot be built; None if nothing was tried."""
        if not self.cfg.get('model') or self.unusable_scopes:
            return None
        cfg = dict(self.cfg['model'])
        if self.cfg.get('data_preprocessor'):  # as the Runner does
            cfg.setdefault('data_preprocessor', self.cfg['data_preprocessor'])
        with torch.device('meta'):
            model = self.build(MODELS, cfg)
        return model if isinstance(model, Exception) else model.to('meta')

    @property
    def model(self) -> Any:
        """The model on the meta device, None if it cannot be built."""
        return None if isinstance(self.built, Exception) else self.built

    @property
    def encoder(self) -> CAEViT | None:
        """The backbone, if it is ours."""
        backbone = getattr(self.model, 'backbone', None)
        return backbone if isinstance(backbone, CAEViT) else None

    @property
    def pretrains(self) -> bool:
        """Whether the model is ``CAE`` with our encoder."""
        return isinstance(self.model, CAE) and self.encoder is not None

    @cached_property
    def preprocessor(self) -> Any:
        """The data preprocessor, with its values, or why it cannot be built; None if none is."""
        cfg = self.get('model.data_preprocessor') or self.get('data_preprocessor')
        if cfg is None:
            return CAEDataPreprocessor() if self.pretrains else None
        return self.build(MODELS, cfg)

    @cached_property
    def datasets(self) -> dict[str, dict[str, Any]]:
        """The datasets of all loaders without their wrappers, by key."""
        loaders = tuple(f'{loader}.dataset' for loader in LOADERS)
        return {k: v for k, v in self.typed if k.startswith(loaders) and 'pipeline' in v}

    @cached_property
    def transforms(self) -> dict[str, Any]:
        """Each transform of each pipeline, built, or the exception that it raised, by key."""
        if self.unusable_scopes:
            return {}
        return {
            f'{key}.pipeline.{i}': self.build(TRANSFORMS, step)
            for key, node in self.datasets.items()
            for i, step in enumerate(node['pipeline'])
        }

    def build(self, registry: Registry, cfg: dict[str, Any]) -> Any:
        """Build from a config as the Runner would, or return the exception."""
        return self.attempt(registry.build, ConfigDict(deepcopy(cfg)))

    def attempt(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call ``function`` quietly in the config's scope; return its result or the exception."""
        try:
            with quiet(), DefaultScope.overwrite_default_scope(self.scope):
                return function(*args)
        except Exception as error:  # whatever is raised in there
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


@contextmanager
def quiet() -> Iterator[None]:
    """Keep logs, warnings and prints of what is imported, built and run to itself."""
    logger = MMLogger.get_current_instance()  # has a cache that logging.disable does not reach
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def _walk(node: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All dicts with a type, outer ones first."""
    if isinstance(node, dict):
        if 'type' in node:
            yield key, node
        for name, value in node.items():
            yield from _walk(value, f'{key}.{name}')
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _walk(value, f'{key}.{i}')
