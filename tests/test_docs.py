"""Commands that README and docs give can be read: configs, options and settings are there."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from cae_mm.doctor.case import get
from cae_mm.engine.cli import add_config_arguments, load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
VARIABLE = re.compile(r'^ +(\w+)=(\S+)$', re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Commands of indented blocks that start a training or a test with a config of ours."""
    text = page.read_text().replace('\\\n', ' ')
    variables = dict(VARIABLE.findall(text))
    lines = [line.strip() for line in text.splitlines() if line.startswith('    ')]
    lines = [re.sub(r'\$(\w+)', lambda m: variables.get(m[1], m[0]), line) for line in lines]
    words = [shlex.split(line, comments=True) for line in lines if 'tools/t' in line]
    return [command for command in words if any(word.startswith('configs/') for word in command)]


CASES = [
    pytest.param(command, id=f'{page.stem}-{i}')
    for page in PAGES
    for i, command in enumerate(commands(page))
]


def test_pages_have_commands():
    assert len(CASES) > 10


@pytest.mark.parametrize('command', CASES)
def test_documented_command(command):
    command = command[command.index(next(w for w in command if w.startswith('configs/'))) :]
    if '$' in command[0]:
        pytest.skip('its config is the variable of a loop')
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    args, _ = parser.parse_known_args(command)
    before = load_config(args.config)
    load_config(args.config, args.cfg_options)  # refuses settings that nothing takes
    for key in args.cfg_options or {}:
        owner = key.rpartition('.')[0]
        assert owner == 'settings' or get(before._cfg_dict, owner) is not None, key
