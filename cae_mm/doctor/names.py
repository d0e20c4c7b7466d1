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
    own = _own_classes()
    for key, node in case.typed:
        if not isinstance(node['type'], str):
            continue
        scope, _, name = node['type'].rpartition('.')
        if scope == 'cae_mm' and name not in own:
            text = f'cae_mm has no {name}{suggest(name, own)}'
            yield case.finding('error', f'{key}.type', text)
        elif scope == 'cae_mm':
            yield from _check_arguments(case, key, node, own[name][1])
        elif not scope and name in own and case.scope != 'cae_mm':
            yield _check_scope(case, key, name, own[name][0])


def _own_classes() -> dict[str, tuple[Registry, Any]]:
    """Everything that is registered in our scope, with its registry."""
    classes: dict[str, tuple[Registry, Any]] = {}
    for name in own_registries.__all__:
        registry: Registry = getattr(own_registries, name)
        registry.import_from_location()
        classes |= {key: (registry, value) for key, value in registry.module_dict.items()}
    return classes


def _check_arguments(case: Case, key: str, node: dict[str, Any], cls: Any) -> Iterator[Finding]:
    parameters = signature(cls).parameters
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        return  # building it tells
    for name in node.keys() - parameters.keys() - MMENGINE_KEYS:
        text = f'{cls.__name__} has no argument {name}{suggest(name, parameters)}'
        yield case.finding('error', f'{key}.{name}', text)


def _check_scope(case: Case, key: str, name: str, registry: Registry) -> Finding:
    assert registry.parent is not None
    with quiet(), registry.parent.switch_scope_and_registry(case.scope) as scoped:
        other = scoped.get(name)
    remedy = f"write type='cae_mm.{name}', or '{case.scope}.{name}' if that is meant"
    if other is None:
        text = f'the scope {case.scope} has no {name}, cae_mm has'
        return case.finding('error', f'{key}.type', text, remedy)
    text = f'without a scope this is {other.__module__}.{name}, not that of cae_mm'
    return case.finding('warning', f'{key}.type', text, remedy)
