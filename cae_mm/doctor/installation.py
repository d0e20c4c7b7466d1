"""What is installed: packages, registries, operators, devices, tokenizer weights."""

import os
import platform
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from cae_mm.dependencies import (
    DEPENDENCIES,
    Dependency,
    Problem,
    find_import_problem,
    find_problem,
)

WEIGHT_SUFFIXES = ('.pkl', '.pt', '.pth', '.safetensors')


class Section(NamedTuple):
    """One part of the report: a title, rows of equally many cells, and what is wrong."""

    title: str
    rows: list[tuple[str, ...]]
    problems: list[Problem]

    def __str__(self) -> str:
        """Returns the title and the rows, with aligned columns."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = [self.title]
        for row in self.rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append('  ' + '  '.join(cells).rstrip())
        return '\n'.join(lines)


def check_packages() -> Section:
    """Versions of everything in DEPENDENCIES, each imported once."""
    rows: list[tuple[str, ...]] = [('python', platform.python_version(), sys.executable, 'ok')]
    problems = []
    for dependency in DEPENDENCIES:
        problem = find_problem(dependency)
        if problem is None and dependency.installed:
            problem = find_import_problem(dependency)
        if problem:
            problems.append(problem)
        rows.append(_package_row(dependency, problem))
    return Section('Packages', rows, problems)


def _package_row(dependency: Dependency, problem: Problem | None) -> tuple[str, ...]:
    installed = dependency.installed
    if not installed:
        state = 'missing (optional)' if dependency.optional else 'missing'
        return dependency.package, '-', '-', state
    names = ', '.join(_provenance(dependency, requirement.name) for requirement in installed)
    versions = ', '.join(installed.values())
    return dependency.package, versions, names, problem.state if problem else 'ok'


def _provenance(dependency: Dependency, distribution: str) -> str:
    if dependency.upstream is None:
        return distribution
    source = 'OneDL' if distribution == dependency.onedl.name else 'upstream'
    return f'{distribution} ({source})'


def check_registries() -> Section:
    """What the scope cae_mm offers to configs, and where ``get_model`` learns its models."""
    title = 'Registry scope cae_mm'
    try:
        registries = import_module('cae_mm.registry')
        rows: list[tuple[str, ...]] = []
        for name in registries.__all__:
            registry = getattr(registries, name)
            registry.import_from_location()
            rows.append((name, ', '.join(sorted(registry.module_dict)) or 'empty'))
        model_index = import_module('cae_mm.model_index')
        rows.append(('model index', str(model_index.find_model_index() or 'not found')))
    except Exception as error:  # whatever a module of ours raises while it is imported
        text = f'the scope cae_mm is not registered: {error}'
        command = f'{sys.executable} -c "import cae_mm.models, cae_mm.datasets, cae_mm.engine"'
        return Section(title, [('not registered',)], [Problem('broken', text, command)])
    return Section(title, rows, [])


def check_operators() -> Section:
    """Whether mmcv was built with compiled operators."""
    try:
        import_module('torch')  # its libraries have to be loaded first
        import_module('mmcv._ext')
        state = 'yes'
    except Exception:  # a broken torch or mmcv is reported with the packages
        state = 'no'
    return Section(
        'mmcv with compiled operators', [(state, 'needed by mmdet, and by upstream mmseg')], []
    )


def check_devices() -> Section:
    """The CPU and the GPUs that torch sees, and the number format that they train in."""
    title = 'Devices'
    try:
        cuda = import_module('torch').cuda
        choose_precision = import_module('cae_mm.precision').choose_precision
    except Exception:  # a broken torch is reported with the packages
        return Section(title, [('unknown: torch cannot be imported',)], [])
    rows: list[tuple[str, ...]] = [('CPU', f'{os.cpu_count()} cores', str(choose_precision('cpu')))]
    for index in range(cuda.device_count()):
        memory = f'{cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB'
        with cuda.device(index):
            rows.append((f'GPU {index}', memory, str(choose_precision('cuda'))))
    return Section(title, rows, [])


def check_weights(folder: Path) -> Section:
    """The weight files in the folder for tokenizers."""
    files = sorted(path for path in folder.glob('*') if path.suffix in WEIGHT_SUFFIXES)
    rows: list[tuple[str, ...]] = [
        (path.name, f'{path.stat().st_size / 2**20:.1f} MiB') for path in files
    ]
    return Section(f'Tokenizer weights in {folder}', rows or [('none',)], [])
