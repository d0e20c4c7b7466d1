"""What an exception, raised where something was built, says about the config."""

import re
import traceback
from typing import Any

from mmengine.registry import build_from_cfg

from cae_mm.doctor.case import Case, Finding

ARGUMENT = re.compile(r"unexpected keyword argument '(\w+)'|^(\w+) must be|Unknown (\w+)")


def failure(case: Case, key: str, error: Exception) -> Finding:
    """A finding about the dict at ``key``, or the place in it that the exception blames."""
    owners = [str(cfg['type']).rpartition('.')[2] for cfg in _built_from(error)[:1]]
    text = ': '.join([*owners, explain(error)])
    return case.found('error', _blame(case, key, error), text, 'mend it as the message says')


def explain(error: Exception) -> str:
    """What was raised, without mmengine's advice."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = text.partition('. Please check whether the value of')[0]
    return ' '.join(text.split()) or type(error).__name__


def _blame(case: Case, top: str, error: Exception) -> str:
    """The key in ``top`` that an exception speaks of, as far as it can be found."""
    text = explain(error)
    for name in re.findall(r'[a-z]\w*(?:\.\w+)+', text):
        if case.get(f'{top}.{name}') is not None:
            return f'{top}.{name}'
    places = [
        key
        for cfg in _built_from(error)
        for key, node in case.typed
        if f'{key}.'.startswith(f'{top}.') and node['type'] == cfg['type']
    ]
    key = next(iter(places), top)
    argument = ARGUMENT.search(text)
    name = next(filter(None, argument.groups()), '') if argument else ''
    return f'{key}.{name}' if case.get(f'{key}.{name}') is not None else key


def _built_from(error: Exception) -> list[dict[str, Any]]:
    """The configs that were being built when an exception was raised, innermost first.

    They stand in the frames of mmengine's ``build_from_cfg``, which does not add them itself.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    frames = [frame for frame in frames if frame.f_code is build_from_cfg.__code__]
    return [cfg for frame in reversed(frames) if 'type' in (cfg := frame.f_locals['cfg'])]
