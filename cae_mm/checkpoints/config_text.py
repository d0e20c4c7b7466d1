"""The text of a config, as runs write it into folders and checkpoints, read without running it."""

import ast
from typing import Any


def read_values(text: str | bytes) -> dict[str, Any]:
    """Read the values of a config that mmengine has written; nothing is executed.

    What is more than a plain value stays the text that it is.

    Raises:
        ValueError: If the text is no Python, or nested too deeply.
    """
    try:
        return {
            node.targets[0].id: _value(node.value)
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f'not the config of a run: {error}') from error


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
