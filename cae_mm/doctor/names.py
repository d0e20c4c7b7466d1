"""Types of ours that do not exist or lack their scope, and arguments that they do not have."""

from collections.abc import Iterator
from inspect import Parameter, signature
from typing import Any

from mmengine.registry import Registry

from cae_mm import registry as own_registries
from cae_mm.doctor.case import Case, quiet
from cae_mm.doctor.finding import Finding
from cae_mm.engine.settings import suggest

# what mmengine takes out of a dict before it reaches the class
MMENGINE_KEYS = {'type', 'constructor', 'paramwise_cfg', 'priority', '_scope_', '_delete_'}


def check_names(case: Case) -> Iterator[Finding]:
    """Look at each dict with a type; other packages' arguments are seen when it is built."""
    own: dict[str, tuple[Registry, Any]] = {}  # all that is registered in our scope
    for registry in map(vars(own_registries).get, own_registries.__all__):
        assert isinstance(registry, Registry)
        registry.import_from_location()
        own |= {name: (registry, value) for name, value in registry.module_dict.items()}
    for key, node in case.typed:
        if not isinstance(node['type'], str):
            continue
        scope, _, name = node['type'].rpartition('.')
        if scope == 'cae_mm' and name not in own:
            text = f'cae_mm has no {name}{suggest(name, own)}'
            yield case.finding('error', f'{key}.type', text)
        elif scope == 'cae_mm':
            parameters = signature(own[name][1]).parameters
            if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
                continue  # building it tells
            for argument in node.keys() - parameters.keys() - MMENGINE_KEYS:
                text = f'{name} has no argument {argument}{suggest(argument, parameters)}'
                yield case.finding('error', f'{key}.{argument}', text)
        elif not scope and name in own and case.scope != 'cae_mm':
            yield _check_scope(case, key, name, own[name][0])


def _check_scope(case: Case, key: str, name: str, registry: Registry) -> Finding:
    assert registry.parent is not None
    with quiet(), registry.parent.switch_scope_and_registry(case.scope) as scoped:
        other = scoped.get(name)
    level, text = 'error', f'the scope {case.scope} has no {name}, cae_mm has'
    if other is not None:
        level = 'warning'
        text = f'without a scope this is {other.__module__}.{name}, not that of cae_mm'
    remedy = f"write type='cae_mm.{name}', or '{case.scope}.{name}' if that is meant"
    return case.finding(level, f'{key}.type', text, remedy)
