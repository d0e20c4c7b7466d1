"""Damaged and hostile files of every kind; tests/soak has more of the same."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / 'fuzzing.py'


def fuzz(folder, seed, cases):
    """Run tests/fuzzing.py, which is a process of its own for its limits."""
    command = [sys.executable, SCRIPT, folder, str(seed), str(cases)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_files_from_strangers_are_read_as_data_or_refused(tmp_path):
    report = fuzz(tmp_path / 'files', 0, 300)
    counts = report['results']
    for kind in ('zip', 'old', 'paddle', 'safetensors', 'tar', 'index'):
        assert counts[f'{kind} read'] and counts[f'{kind} refused'], report
    for kind in ('convert', 'dalle', 'pickle'):
        assert counts[f'{kind} refused'], report
