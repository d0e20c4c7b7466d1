"""Imports run downwards only: from a layer to those below it."""

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Modules and subpackages of cae_mm, lowest first; those that share a layer do not know each other.
LAYERS = [
    {'version', 'dependencies'},
    {'__init__'},
    {'patches', 'precision', 'seeds'},
    {'checkpoints', 'model_index'},
    {'registry'},
    {'datasets', 'models'},
    {'engine', 'evaluation'},
    {'visualization'},
    {'hooks', 'conversion', 'apis'},
    {'doctor', 'replay', 'report'},
    {'plan'},
]
HEIGHTS = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yields the line and the dotted name of each import, those inside functions too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = resolve_name('.' * level + (module or ''), package)
                yield from ((node.lineno, f'{base}.{alias.name}') for alias in names)
            case ast.Call(
                func=ast.Name(id='import_module') | ast.Attribute(attr='import_module'),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def upward_imports(path: str, text: str) -> list[str]:
    """Names each line of a module of cae_mm that imports from its own height or above."""
    package, name, *_ = Path(path).with_suffix('').parts
    lines = []
    for line, target in imported(ast.parse(text), '.'.join(Path(path).parent.parts)):
        top, _, rest = target.partition('.')
        other = rest.partition('.')[0]
        other = other if other in HEIGHTS else '__init__'
        if top == package and other != name and HEIGHTS[other] >= HEIGHTS[name]:
            lines.append(f'{path}:{line}: {name} may not import {target}')
    return lines


def test_every_module_has_a_layer():
    names = {path.stem for path in (ROOT / 'cae_mm').iterdir() if path.suffix == '.py'}
    names |= {path.parent.name for path in (ROOT / 'cae_mm').glob('*/__init__.py')}
    assert names <= set(HEIGHTS), 'add it to LAYERS'


def test_no_import_runs_upward():
    paths = sorted(path.relative_to(ROOT) for path in (ROOT / 'cae_mm').rglob('*.py'))
    assert paths
    lines = [line for path in paths for line in upward_imports(str(path), path.read_text())]
    assert not lines, '\n'.join(lines)


@pytest.mark.parametrize(
    ('text', 'target'),
    [
        ('import cae_mm.hooks', 'cae_mm.hooks'),
        ('from cae_mm.models.vit import CAEViT', 'cae_mm.models.vit.CAEViT'),
        ('from cae_mm import registry, doctor', 'cae_mm.doctor'),
        ('from ..models import CAEViT', 'cae_mm.models.CAEViT'),
        ('def f():\n    from cae_mm import engine', 'cae_mm.engine'),
        ("importlib.import_module('cae_mm.evaluation')", 'cae_mm.evaluation'),
    ],
)
def test_upward_imports_are_named(text, target):
    [line] = upward_imports('cae_mm/datasets/masking.py', text)
    number = text.count('\n') + 1
    assert line == f'cae_mm/datasets/masking.py:{number}: datasets may not import {target}'
