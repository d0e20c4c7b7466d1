"""What is installed: packages, registries, operators, devices, tokenizer weights."""

import os
import platform
import sys
from importlib import import_module
from pathlib import Path

from cae_mm.dependencies import DEPENDENCIES, Problem, find_import_problem, find_problem

WEIGHT_SUFFIXES = ('.pkl', '.pt', '.pth', '.safetensors')


Rows = list[tuple[str, ...]]


def print_rows(title: str, rows: Rows) -> None:
    """Print a part of the report with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(title)
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print('  ' + '  '.join(cells).rstrip())
    print()


def check_packages() -> tuple[Rows, list[Problem]]:
    """Versions of everything in DEPENDENCIES, each imported once."""
    rows: Rows = [('python', platform.python_version(), sys.executable, 'ok')]
    problems = []
    for dependency in DEPENDENCIES:
        problem = find_problem(dependency)
        if problem is None and dependency.installed:
            problem = find_import_problem(dependency)
        if problem:
            problems.append(problem)
        installed = dependency.installed
        versions = ', '.join(installed.values())
        names = ', '.join(known.name for known in installed)
        if dependency.upstream and len(installed) == 1:
            names += ' (OneDL)' if dependency.onedl in installed else ' (upstream)'
        state = problem.state if problem else 'ok' if installed else 'missing (optional)'
        rows.append((dependency.package, versions or '-', names or '-', state))
    return rows, problems


def check_registries() -> tuple[Rows, list[Problem]]:
    """What the scope cae_mm offers to configs, and where ``get_model`` learns its models."""
    try:
        registries = import_module('cae_mm.registry')
        rows: Rows = []
        for name in registries.__all__:
            registry = getattr(registries, name)
            registry.import_from_location()
            rows.append((name, ', '.join(sorted(registry.module_dict)) or 'empty'))
        model_index = import_module('cae_mm.model_index')
        rows.append(('model index', str(model_index.find_model_index() or 'not found')))
    except Exception as error:  # whatever a module of ours raises while it is imported
        text = f'the scope cae_mm is not registered: {error}'
        command = f'{sys.executable} -c "import cae_mm.models, cae_mm.datasets, cae_mm.engine"'
        return [('not registered',)], [Problem('broken', text, command)]
    return rows, []


def check_operators() -> Rows:
    """Whether mmcv was built with compiled operators."""
    try:
        import_module('torch')  # its libraries have to be loaded first
        import_module('mmcv._ext')
        state = 'yes'
    except Exception:  # a broken torch or mmcv is reported with the packages
        state = 'no'
    return [(state, 'needed by mmdet, and by upstream mmseg')]


def check_devices() -> Rows:
    """The CPU and the GPUs that torch sees, and the number format that they train in."""
    try:
        cuda = import_module('torch').cuda
        choose_precision = import_module('cae_mm.precision').choose_precision
    except Exception:  # a broken torch is reported with the packages
        return [('unknown: torch cannot be imported',)]
    rows: Rows = [('CPU', f'{os.cpu_count()} cores', str(choose_precision('cpu')))]
    for index in range(cuda.device_count()):
        memory = f'{cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB'
        with cuda.device(index):
            rows.append((f'GPU {index}', memory, str(choose_precision('cuda'))))
    return rows


def check_weights(folder: Path) -> Rows:
    """The weight files in the folder for tokenizers."""
    files = sorted(path for path in folder.glob('*') if path.suffix in WEIGHT_SUFFIXES)
    rows: Rows = [(path.name, f'{path.stat().st_size / 2**20:.1f} MiB') for path in files]
    return rows or [('none',)]
