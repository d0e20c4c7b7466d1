"""Thousands of damaged and hostile files, other ones with each seed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / 'fuzzing.py'
CASES = 10_000


@pytest.mark.parametrize('seed', [1, 2])
def test_files_from_strangers(tmp_path, seed, capsys):
    command = [sys.executable, SCRIPT, tmp_path / 'files', str(seed), str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f'\nfiles, seed {seed}: {sum(report["results"].values())} read or refused')
        for name, value in report.items():
            print(f'  {name}: {value}')
