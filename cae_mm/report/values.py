"""Values of configs by dotted key, and how those of two configs differ."""

from collections import Counter
from typing import Any


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
