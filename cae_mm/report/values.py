"""Configs that a run has written, read without running them, and how two of them differ."""

import ast
from collections import Counter
from pathlib import Path
from typing import Any


def read_values(path: Path) -> dict[str, Any]:
    """Read the values of a config that ``Config.dump`` has written; nothing is executed.

    What is more than a plain value stays the text that it is.

    Raises:
        ValueError: If the file is no Python.
    """
    try:
        tree = ast.parse(path.read_text(encoding='utf-8'))
        return {
            node.targets[0].id: _value(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f'{path} is no config that a run has written: {error}') from error


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id='dict'), args=[], keywords=keywords):
            return {str(keyword.arg): _value(keyword.value) for keyword in keywords}
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return {str(_value(key)): _value(value) for key, value in pairs if key is not None}
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return ast.unparse(node)


def flatten(values: Any, prefix: str = '') -> dict[str, Any]:
    """Values by dotted key; items of a list that have a type stand under its name."""
    if isinstance(values, list | tuple) and any(isinstance(item, dict) for item in values):
        names = [_name(item) or str(i) for i, item in enumerate(values)]
        seen = Counter(names)
        values = {
            name if seen[name] == 1 else f'{name}-{i}': item
            for i, (name, item) in enumerate(zip(names, values, strict=True))
        }
    if not isinstance(values, dict) or not values:
        return {prefix.removesuffix('.'): values}
    flat = {}
    for name, value in values.items():
        flat.update(flatten(value, f'{prefix}{name}.'))
    return flat


def differences(
    configs: list[dict[str, Any]], leave_out: tuple[str, ...] = ()
) -> dict[str, list[Any]]:
    """Keys that configs, flattened, do not agree on, and what each says; '' where it is silent."""
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: [config.get(key, '') for config in configs] for key in keys}
    return {
        key: row
        for key, row in sorted(rows.items())
        if key.partition('.')[0] not in leave_out and any(_plain(x) != _plain(row[0]) for x in row)
    }


def _plain(value: Any) -> Any:
    """Tuples are lists once they were written."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _name(item: Any) -> str:
    return str(item.get('type', '')).rpartition('.')[2] if isinstance(item, dict) else ''
