"""Break the code in small ways, one at a time, and count how many of them the tests notice.

    python tests/mutants.py --count 300 --log mutants.json [cae_mm/models/neck.py ...]

A process that has imported torch and OpenMMLab forks for each mutant; only the tests that reach the
mutated line run, all tests of that file where none does or where they notice nothing. What the log
says was noticed is not tried again, so that a second call continues, or repeats the survivors.
"""

import argparse
import ast
import importlib
import importlib.machinery
import json
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

HEAVY = ('mmpretrain.models', 'mmpretrain.apis', 'mmengine.runner', 'webdataset', 'skimage.data')
PACKAGES = ('models', 'datasets', 'checkpoints')
# tests of a file beside test_<its name>.py in the folder of its package
TESTS = {
    'models/archs': ['models/vit'],
    'models/blocks': ['models/vit', 'models/vit_dense', 'models/parity'],
    'models/cae': ['models/cae_complementary', 'models/parity'],
    'models/functional': ['models/blocks', 'models/vit_dense'],
    'models/head': ['models/cae'],
    'models/neck': ['models/cae', 'models/parity'],
    'models/positions': ['models/vit_dense', 'models/vit'],
    'models/sync_batch_norm': ['models/feature_pyramid', 'engine/distributed'],
    'models/targets/*': ['models/targets', 'tools/convert_dalle'],
    'models/vit': ['models/vit_dense', 'models/parity', 'models/description'],
    'datasets/shard_index': ['datasets/shards', 'tools/make_shards'],
    'datasets/resumable': ['engine/resuming', 'hooks/unreadable'],
    'datasets/unreadable': ['hooks/unreadable'],
    'checkpoints/*': [
        'checkpoints/files',
        'checkpoints/load_pretrained',
        'checkpoints/unpickler',
        'hooks/loading',
    ],
    'checkpoints/whole': ['engine/resuming'],
}
SWAPS: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift},
}
FATES = {0: 'survived', 1: 'killed', 2: 'killed'}  # by pytest's status: failed, not importable
OPTIONS = ['-x', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '--hypothesis-profile=mutants']
OPTIONS += ['-W', 'ignore::pytest.PytestAssertRewriteWarning']
CPU_SECONDS, SECONDS, BYTES = 60, 600, 16 << 30  # the most that a mutant may take


class Mutant(NamedTuple):
    """One change of a file; ``apply`` makes it in the tree."""

    line: int
    text: str
    apply: Callable[[], None]


def find_mutants(tree: ast.AST) -> Iterator[Mutant]:
    """Yield all changes of a file: operators, conditions, constants, calls, arguments, returns.

    Messages, annotations, docstrings and assertions are left alone.
    """
    for field, value in ast.iter_fields(tree):
        if field in ('annotation', 'returns'):
            continue
        for i, node in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(node, ast.AST) or _is_text(node):
                continue

            def put(
                new: ast.AST | None, i: int = i, field: str = field, value: Any = value
            ) -> None:
                if not isinstance(value, list):
                    setattr(tree, field, new)
                elif new is None:
                    del value[i]
                else:
                    value[i] = new

            for new in _variants(node, field):
                old, line = node, getattr(node, 'lineno', 0)
                if new is not None:
                    ast.copy_location(new, old)
                    ast.fix_missing_locations(new)
                after = '(nothing)' if new is None else ast.unparse(new)
                text = ' -> '.join(' '.join(x.split())[:90] for x in (ast.unparse(old), after))
                yield Mutant(line, text, lambda new=new, put=put: put(new))  # type: ignore[misc]
            if not isinstance(node, ast.Raise):
                yield from find_mutants(node)


def _is_text(node: ast.AST) -> bool:
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or isinstance(node, ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom)


def _variants(node: Any, field: str) -> Iterator[ast.AST | None]:
    match node:
        case ast.Compare(left, [operator], rest) if type(operator) in SWAPS:
            yield ast.Compare(left, [SWAPS[type(operator)]()], rest)
        case ast.BinOp(left, operator, right) if type(operator) in SWAPS:
            yield ast.BinOp(left, SWAPS[type(operator)](), right)
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(SWAPS[type(operator)](), values)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1 if isinstance(value, int) else value * 2 or 1.0)
        case ast.Constant(str(value)):
            yield ast.Constant(f'{value}X')
        case ast.Return(value) if value is not None:
            yield ast.Return(None)
        case ast.Expr(ast.Call()) | ast.Raise() | ast.AugAssign():
            yield ast.Pass()
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
        case ast.keyword(str()):
            yield None
    if field in ('decorator_list', 'ifs'):
        yield None
    if field == 'test' and not isinstance(node, ast.Compare | ast.BoolOp | ast.UnaryOp):
        yield ast.UnaryOp(ast.Not(), node)


def tests_of(file: Path) -> list[str]:
    """Return the test files of a source file."""
    part = file.relative_to('cae_mm').with_suffix('')
    names = [str(part), *TESTS.get(str(part), []), *TESTS.get(f'{part.parent}/*', [])]
    paths = [f'tests/test_{x.split("/")[0]}/test_{x.split("/")[-1]}.py' for x in names]
    return [path for path in dict.fromkeys(paths) if Path(path).exists()]


class Reach:
    """Plugin of pytest that notes which lines of a file each test reaches, and its seconds."""

    def __init__(self, file: Path) -> None:
        self.file, self.lines, self.seconds = str(file.absolute()), defaultdict(set), {}

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != self.file:
            return None
        self.current.add(frame.f_lineno)
        return self.trace

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self.current, start = self.lines[item.nodeid], time.process_time()
        sys.settrace(self.trace)
        yield
        sys.settrace(None)
        self.seconds[item.nodeid] = time.process_time() - start


class Choice:
    """Plugin of pytest that runs the tests named only, in that order."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        found = {item.nodeid: item for item in items}
        items[:] = [found[name] for name in self.names if name in found]


def in_fork(work: Callable[[], int]) -> int:
    """Do something in a process of its own, silently and within limits; return its status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(null, stream)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
            signal.alarm(SECONDS)
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_tests(paths: list[str], plugin: Any) -> int:
    """Run tests in this process until the first fails."""
    with tempfile.TemporaryDirectory() as folder:
        options = [*OPTIONS, f'--basetemp={folder}/t']
        return int(pytest.main([*options, *paths], plugins=[plugin]))


def run_mutant(file: Path, tree: ast.AST, mutant: Mutant, names: list[str]) -> int:
    """Run tests with a mutant in place of a file."""
    mutant.apply()
    get_code = importlib.machinery.SourceFileLoader.get_code

    def get(loader: Any, name: str) -> Any:
        if Path(loader.path) == file.absolute():
            return compile(tree, loader.path, 'exec')  # type: ignore[arg-type]
        return get_code(loader, name)

    importlib.machinery.SourceFileLoader.get_code = get  # type: ignore[method-assign]
    return run_tests(sorted({name.split('::')[0] for name in names}), Choice(names))


def measure(file: Path) -> tuple[dict[str, list[int]], dict[str, float]]:
    """Run all tests of a file as it is: lines that each reaches, and seconds."""
    with tempfile.NamedTemporaryFile() as found:

        def work() -> int:
            reach = Reach(file)
            status = run_tests(tests_of(file), reach)
            lines = {name: sorted(numbers) for name, numbers in reach.lines.items()}
            Path(found.name).write_text(json.dumps([lines, reach.seconds]))
            return status

        if status := in_fork(work):
            raise RuntimeError(f'{tests_of(file)} fail without a mutant: {status}')
        return json.loads(Path(found.name).read_text())


def try_file(file: Path, chosen: list[int], log: dict[str, Any]) -> None:
    """Try mutants of a file and note in the log what became of them."""
    lines, seconds = measure(file)
    everything = sorted(seconds, key=seconds.__getitem__)
    if in_fork(lambda: run_tests(tests_of(file), Choice(everything))):
        raise RuntimeError(f'{tests_of(file)} fail without a mutant, the quickest first')
    for number in chosen:
        tree = ast.parse(file.read_text())
        mutant = list(find_mutants(tree))[number]
        reaching = [name for name in everything if mutant.line in lines[name]]
        work = [partial(run_mutant, file, tree, mutant, names) for names in (reaching, everything)]
        status = (reaching and in_fork(work[0])) or in_fork(work[1])
        key = f'{file}:{mutant.line} {mutant.text} #{number}'
        log[key] = FATES.get(status, 'stopped')  # by a limit, if it is of neither
        print(log[key], key, flush=True)


def interval(killed: int, tried: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, p = 1.96, killed / tried
    centre, spread = (
        p + z * z / 2 / tried,
        z * math.sqrt(p * (1 - p) / tried + (z / 2 / tried) ** 2),
    )
    return (centre - spread) / (1 + z * z / tried), (centre + spread) / (1 + z * z / tried)


def report(log: dict[str, str]) -> None:
    """Print the share of the mutants that were killed."""
    for package in (*(f'cae_mm/{name}/' for name in PACKAGES), 'cae_mm/'):
        fates = [fate for key, fate in log.items() if key.startswith(package)]
        if fates:
            killed = len(fates) - fates.count('survived')
            low, high = (f'{100 * x:.0f}' for x in interval(killed, len(fates)))
            print(
                f'{package:22} {killed} of {len(fates)} killed: {100 * killed / len(fates):.1f} %'
            )
            print(f'{"":22} of all such mutants {low} to {high} %, with 95 % confidence')


def main() -> None:
    """Try a sample of the mutants, from each file its share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('files', nargs='*', type=Path)
    parser.add_argument('--count', type=int, default=300, help='mutants, of all files together')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--log', type=Path, default=Path('mutants.json'))
    args = parser.parse_args()
    every = [path for name in PACKAGES for path in sorted(Path('cae_mm', name).rglob('*.py'))]
    counts = {path: len(list(find_mutants(ast.parse(path.read_text())))) for path in every}
    counts = {path: count for path, count in counts.items() if path.name != '__init__.py'}
    print(f'{sum(counts.values())} mutants of {len(counts)} files')
    log = json.loads(args.log.read_text()) if args.log.exists() else {}
    torch.set_num_threads(1)
    for module in HEAVY:
        importlib.import_module(module)
    for path, count in counts.items():
        size = math.ceil(args.count * count / sum(counts.values()))
        chosen = random.Random(f'{args.seed} {path}').sample(range(count), min(size, count))
        known = [key for key in log if key.startswith(f'{path}:') and log[key] != 'survived']
        done = {int(key.rpartition('#')[2]) for key in known}
        chosen = [number for number in chosen if number not in done]
        if chosen and (not args.files or path in args.files):
            try_file(path, chosen, log)
            args.log.write_text(json.dumps(log, indent=1))
    report(log)


if __name__ == '__main__':
    main()
