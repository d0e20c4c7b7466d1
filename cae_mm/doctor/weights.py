"""The checkpoints of a config, loaded as the run would do it, but into the meta device."""

from collections.abc import Iterator
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from cae_mm.checkpoints import Checkpoint, load_pretrained, read_checkpoint
from cae_mm.checkpoints.pretrained import find_file
from cae_mm.doctor.case import Case, get
from cae_mm.doctor.finding import Finding, explain
from cae_mm.hooks import SafeLoadHook

COMMAND_LINE = 'CHECKPOINT'
MIN_MATCHED = signature(SafeLoadHook).parameters['min_matched'].default


class Load(NamedTuple):
    """Weights that a run is going to load."""

    key: str  # where the path stands
    path: str
    module: str = ''  # part of the model that they are for, '' is all of it
    prefix: str = ''

    def finding(self, case: Case, level: str, text: str, remedy: str = '') -> Finding:
        """A finding about the file."""
        value = self.path if self.key == COMMAND_LINE else case.get(self.key)
        return Finding(level, self.key, text, remedy, value)


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
    if case.checkpoint is None:
        return loads
    path = str(case.checkpoint)
    backbone = next((load for load in loads if load.module == 'backbone'), None)
    rest = [load for load in loads if load is not backbone]
    if backbone is None or _is_whole(case, path):
        return [*rest, Load(COMMAND_LINE, path)]
    return [*rest, backbone._replace(key=COMMAND_LINE, path=path)]


def _is_whole(case: Case, path: str) -> bool:
    """Whether a file holds parts of this model other than its backbone."""
    checkpoint = read_file(path)
    if checkpoint is None or case.model is None:
        return False
    rest = {key for key in case.model.state_dict() if not key.startswith('backbone.')}
    return not rest.isdisjoint(checkpoint.state)


def read_file(path: str) -> Checkpoint | None:
    """What is in a file, None if it cannot be read: ``check_weights`` tells why."""
    file = Path(path).expanduser()
    return _read(file, file.stat().st_mtime_ns) if file.is_file() else None


@lru_cache(maxsize=2)  # several checks look at a file
def _read(path: Path, changed: int) -> Checkpoint | None:
    try:
        return read_checkpoint(path)
    except ValueError:
        return None


def check_weights(case: Case) -> Iterator[Finding]:
    """Whether each checkpoint exists, can be read, and fits as the run wants it to."""
    for load in find_loads(case):
        outcome = case.attempt(_load, case, load)
        if isinstance(outcome, Exception):
            yield load.finding(case, 'error', explain(outcome))
        elif outcome:
            yield load.finding(case, 'note', '; '.join(outcome))


def _load(case: Case, load: Load) -> list[str]:
    """Load into the model, and return what did not fit and need not."""
    module: Any = case.model
    for name in filter(None, load.module.split('.')):
        module = getattr(module, name, None)
    strict = hasattr(module, 'explain_missing_weights')  # mmengine loads others
    if '://' in load.path and not strict:
        return []
    if module is None:  # it cannot be built, or a wrapper has it elsewhere
        find_file(load.path, load.module or 'the model')
        return []
    exact = strict or load.key == COMMAND_LINE or case.get('resume')
    min_matched = 1.0 if exact else MIN_MATCHED
    return load_pretrained(module, load.path, load.prefix, min_matched=min_matched).problems
