"""No line of the package, its tools and benchmarks can execute what a file holds."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATHS = [path for name in ('cae_mm', 'tools', 'benchmarks') for path in (ROOT / name).rglob('*.py')]
# functions that execute pickles or text, or unpack archives to wherever these say
EXECUTES = re.compile(
    r'torch\.(load|jit\.load|hub\.load\w*|package)\b|load_state_dict_from_url|load_from_local'
    r'|(pickle|dill|cloudpickle|marshal|shelve|joblib)\.(load|loads|open|Unpickler)\b|allow_pickle'
    r'|yaml\.(load|full_load|unsafe_load)\b|extractall|fromstring\('
    r'|(?<![\w.])(eval|exec|__import__)\('
)


def test_nothing_executes_files():
    assert len(PATHS) > 80
    lines = [
        f'{path.relative_to(ROOT)}: {line.strip()}'
        for path in PATHS
        for line in path.read_text().splitlines()
        if EXECUTES.search(line)
    ]
    assert not lines, '\n'.join(lines)


@pytest.mark.parametrize(
    'line',
    [
        'torch.load(path, weights_only=True)',
        'torch.hub.load_state_dict_from_url(url)',
        'np.load(path, allow_pickle=True)',
        'pickle.loads(data)',
        'cache = joblib.load(file)',
        'tar.extractall(folder)',
        'Config.fromstring(text)',
        'x = eval(text)',
    ],
)
def test_such_lines_are_found(line):
    assert EXECUTES.search(line)
    assert not EXECUTES.search('model.eval(); torch.load_state(); np.load(file, mmap_mode="r")')
