"""The checkpoints of a config, loaded as the run would do it, but into the meta device."""

from collections.abc import Iterator
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from cae_mm.checkpoints import Checkpoint, load_pretrained, read_checkpoint
from cae_mm.checkpoints.pretrained import find_file
from cae_mm.doctor.case import COMMAND_LINE, Case, get
from cae_mm.doctor.finding import Finding, explain
from cae_mm.hooks import SafeLoadHook

MIN_MATCHED = signature(SafeLoadHook).parameters['min_matched'].default


class Load(NamedTuple):
    """Weights that a run is going to load."""

    key: str  # where the path stands
    path: str
    module: str = ''  # part of the model that they are for, '' is all of it
    prefix: str = ''


def find_loads(case: Case) -> list[Load]:
    """Everything that is loaded into the model; the command line's file takes the config's place.

    It stands for the backbone's ``init_cfg`` unless it holds other parts of this model as well.
    """
    loads = []
    for key, node in case.typed:
        init: Any = node.get('init_cfg')
        if key.startswith('model') and get(init, 'type') == 'Pretrained':
            place, module = f'{key}.init_cfg.checkpoint', key.removeprefix('model').lstrip('.')
            loads.append(Load(place, str(init.checkpoint), module, init.get('prefix') or ''))
    if case.get('load_from'):
        loads.append(Load('load_from', case.get('load_from')))
    path = case.get(COMMAND_LINE)
    if path is None:
        return loads
    backbone = [load for load in loads if load.module == 'backbone']
    keys = case.model.state_dict() if case.model is not None else ()
    checkpoint = read_file(case, path) if backbone else None
    rest = {key for key in keys if not key.startswith('backbone.')}
    whole = checkpoint is not None and not rest.isdisjoint(checkpoint.state)
    new = Load(COMMAND_LINE, path)
    if backbone and not whole:
        new = backbone[0]._replace(key=COMMAND_LINE, path=path)
    return [load for load in loads if load not in backbone] + [new]


def read_file(case: Case, path: str) -> Checkpoint | None:
    """What is in a file, None if it cannot be read: ``check_weights`` tells why."""
    outcome = case.attempt(_read, Path(path).expanduser())
    return outcome if isinstance(outcome, Checkpoint) else None


def _read(path: Path) -> Checkpoint:
    return _read_once(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # several checks look at a file
def _read_once(path: Path, changed: int) -> Checkpoint:
    return read_checkpoint(path)


def check_weights(case: Case) -> Iterator[Finding]:
    """Whether each checkpoint exists, can be read, and fits as the run wants it to."""
    for load in find_loads(case):
        outcome = case.attempt(_load, case, load)
        if isinstance(outcome, Exception):
            yield case.finding('error', load.key, explain(outcome))
        elif outcome:
            yield case.finding('note', load.key, '; '.join(outcome))


def _load(case: Case, load: Load) -> list[str]:
    """Load into the model, and return what did not fit and need not."""
    modules = dict(case.model.named_modules()) if case.model is not None else {}
    module = modules.get(load.module)
    strict = hasattr(module, 'explain_missing_weights')  # mmengine loads others
    if '://' in load.path and not strict:
        return []
    if module is None:  # it cannot be built, or a wrapper has it elsewhere
        find_file(load.path, load.module or 'the model')
        return []
    exact = strict or load.key == COMMAND_LINE or case.get('resume') is True
    min_matched = 1.0 if exact else MIN_MATCHED
    return load_pretrained(module, load.path, load.prefix, min_matched=min_matched).problems
