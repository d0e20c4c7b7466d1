"""Documentation: each block of Python runs, each command is one that its program reads."""

import argparse
import ast
import functools
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import yaml
from builders import IMAGE, ROOT, build_cae, cae_config, run_tool, save_trained
from markdown_it import MarkdownIt
from mmengine.config import Config
from mmengine.registry import HOOKS
from mmengine.runner.checkpoint import CheckpointLoader
from packaging.requirements import Requirement
from PIL import Image
from torch.distributed.run import get_args_parser

import cae_mm.checkpoints
from cae_mm import __version__
from cae_mm.dependencies import EXTRAS_REQUIRE
from cae_mm.doctor.case import get
from cae_mm.engine.cli import load_config

PAGES = [
    ROOT / 'README.md',
    ROOT / 'CONTRIBUTING.md',
    *ROOT.glob('docs/*.md'),
    *ROOT.glob('*/README.md'),
]
NOT_RUN = re.compile(r'<!-- not run: (\S.+) -->')
COMMAND = re.compile(r'make \S|python (tools|benchmarks)/\S+ \S|python -m cae_mm\.\S+ \S')


class Block(NamedTuple):
    """Code of a page."""

    page: Path
    line: int
    code: str
    in_sentence: bool = False

    @property
    def name(self) -> str:
        """Where it stands."""
        return f'{self.page.relative_to(ROOT)}:{self.line}'

    @property
    def is_python(self) -> bool:
        """What Python can parse is Python, the rest is a shell's, as all within sentences."""
        if self.in_sentence:
            return False
        try:
            ast.parse(self.code)
        except SyntaxError:
            return False
        return True


def find_blocks(page: Path) -> Iterator[Block]:
    """Indented and fenced blocks without another language, and commands within sentences."""
    before, line = '', 0
    for token in MarkdownIt('commonmark').enable('table').parse(page.read_text()):
        if token.type == 'code_block' or (token.type == 'fence' and token.info in ('', 'python')):
            if not NOT_RUN.match(before):
                yield Block(page, token.map[0] + 1, token.content)
        line = token.map[0] + 1 if token.map else line
        for child in token.children or ():
            if child.type == 'code_inline' and COMMAND.match(child.content):
                yield Block(page, line, child.content, in_sentence=True)
        before = token.content


BLOCKS = [block for page in sorted(PAGES) for block in find_blocks(page)]
NOTEBOOK = ROOT / 'docs/first_encoder.md'  # whose cells tests/test_notebook.py runs in their order
PROGRAMS = [block for block in BLOCKS if block.is_python and block.page != NOTEBOOK]


def test_the_pages_have_code():
    assert len(PROGRAMS) > 10 and len(BLOCKS) > 60


# --- Python


def prepare_nothing() -> dict:
    return {}


def prepare_task(scope: str, name: str) -> dict:
    """A tiny trained model of a task, and an image."""
    if scope == 'mmdet':
        pytest.importorskip('mmcv.ops', exc_type=ImportError)
        pytest.importorskip('mmdet')
    pytest.importorskip('mmseg.models', exc_type=ImportError)
    save_trained(scope, Path(name)).dump('config.py')
    Image.fromarray(IMAGE).save('image.jpg')
    return dict(CONFIG='config.py', CHECKPOINT=name)


def prepare_weights() -> dict:
    """What the page about weights names: a trained model, and a file to load."""
    model = build_cae()
    torch.save(dict(state_dict=model.state_dict()), 'a.pth')
    return dict(model=model, cae_mm=cae_mm, **prepare_task('mmseg', 'epoch_100.pth'))


def prepare_export() -> dict:
    """The files of the commands that stand above the block."""
    torch.save(build_cae().state_dict(), 'epoch_1.pth')
    Config(dict(model=cae_config())).dump('config.py')
    for out in ('encoder.onnx', 'encoder.pt2'):
        run_tool('export_encoder.py', 'config.py', 'epoch_1.pth', '--out', out)
    return {}


def prepare_photographs() -> dict:
    """A folder in a folder."""
    Path('MY_IMAGES/a').mkdir(parents=True)
    Image.fromarray(IMAGE).save('MY_IMAGES/a/1.JPEG')
    return {}


PREPARE = {
    'checkpoints': prepare_weights,
    'detection': functools.partial(prepare_task, 'mmdet', 'epoch_12.pth'),
    'evaluation': functools.partial(prepare_task, 'mmpretrain', 'epoch_100.pth'),
    'export': prepare_export,
    'segmentation': functools.partial(prepare_task, 'mmseg', 'iter_160000.pth'),
    'start': prepare_photographs,
}


@pytest.mark.parametrize('block', PROGRAMS, ids=lambda block: block.name)
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    code = block.code.replace('224, 224', '16, 16')
    if '_base_ = ' in code:  # a config
        Path('leaf.py').write_text(code.replace("'./", f"'{ROOT}/configs/pretrain/"))
        load_config('leaf.py')
        return
    for folder in ('data/labelled/train', 'data/labelled/val'):
        Path(folder).mkdir(parents=True)
    values = PREPARE.get(block.page.stem, prepare_nothing)()
    values['_base_'] = SimpleNamespace(custom_hooks=[])
    exec(compile(code, block.name, 'exec'), values)
    for hook in values.get('custom_hooks', ()):
        assert hook is ... or HOOKS.build(hook)


# --- shells

RECORD = """set -u
command_not_found_handle() { printf '%s\\0' "$BLOCK" "$@" $'\\n' >> recorded; }
export -f command_not_found_handle
export BLOCK
"""
PATHS = ['tools/slurm_train.sh']  # what a shell does not look for in PATH
PLACEHOLDERS = {'N': '1', 'T': '1', 'RANK_OF_NODE': '0', '...': None, 'KIND': 'attention'}
FRAGMENTS = {  # options alone, of what the sentence before is about
    'detection': 'configs/mask_rcnn/cae_vit-mini_mask-rcnn_1xb4-amp-25e_coco-256px.py',
    'pretraining': 'configs/pretrain/cae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py',
}
SHELLS = sorted({block.page for block in BLOCKS if not block.is_python})


def run_shell(page: Path, folder: Path) -> list[list[str]]:
    """Run a page in bash, which has no programs; name of the block and words of each command."""
    script = RECORD
    for block in BLOCKS:
        if block.page == page and not block.is_python:
            script += f'BLOCK={block.name}\n{block.code}\n'
    for path in PATHS:
        script = script.replace(path, Path(path).name)
    subprocess.run(
        [shutil.which('bash'), '-c', script], cwd=folder, env={'PATH': '/none'}, check=True
    )
    commands = (folder / 'recorded').read_text().split('\0\n\0')[:-1]
    return [command.split('\0') for command in commands]


class Read(BaseException):
    """What a program makes of its arguments; it goes no further."""


def read_arguments(run, name: str, words: list[str], monkeypatch) -> argparse.Namespace:
    """Start a program and stop it when it has read its command line."""
    parse = argparse.ArgumentParser.parse_args

    def read(self, args=None, namespace=None):
        raise Read(parse(self, args, namespace))

    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(Path(name).parent))  # as Python does for a script
        patch.setattr(argparse.ArgumentParser, 'parse_args', read)
        patch.setattr(sys, 'argv', [name, *words])
        with pytest.raises(Read) as stopped:
            run(name, run_name='__main__')
    return stopped.value.args[0]


def check_python(words: list[str], monkeypatch) -> None:
    if words[0] == '-c':
        ast.parse(words[1])
        return
    if words[0] == '-m':  # runpy warns of what another test has imported
        monkeypatch.delitem(sys.modules, f'{words[1]}.__main__', raising=False)
        args = read_arguments(runpy.run_module, words[1], words[2:], monkeypatch)
    else:
        args = read_arguments(runpy.run_path, str(ROOT / words[0]), words[1:], monkeypatch)
    if 'cfg_options' in args:
        options = args.cfg_options or {}
        if isinstance(options, list):  # the doctor's
            options = dict(option.split('=', 1) for option in options)
        check_config(str(args.config), options)


def check_config(config: str, options: dict) -> None:
    if not config.startswith('configs/'):
        return
    before = load_config(ROOT / config)
    load_config(ROOT / config, options)  # refuses settings that nothing takes
    for key in options:
        owner = key.rpartition('.')[0]
        assert (
            not owner or key.startswith('settings.') or get(before._cfg_dict, owner) is not None
        ), key


def check_make(words: list[str], monkeypatch) -> None:
    targets = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    assert {word for word in words if '=' not in word} <= set(targets)


def check_torchrun(words: list[str], monkeypatch) -> None:
    args = get_args_parser().parse_args(words)
    check_python([args.training_script, *args.training_script_args], monkeypatch)


def check_slurm(words: list[str], monkeypatch) -> None:
    check_python(['tools/train.py', *words[2:]], monkeypatch)  # after partition and job


def check_mim(words: list[str], monkeypatch) -> None:
    assert words[0] == 'train' and words[1] in (
        'mmpretrain',
        'mmsegmentation',
        'mmdetection',
        'cae_mm',
    )
    check_config(words[2], {})


def check_pip(words: list[str], monkeypatch) -> None:
    assert words[0] == 'install'
    for option, value in zip(words, words[1:]):
        assert option not in ('-c', '-r') or (ROOT / value).is_file()
    for word in words:
        extras = Requirement(f'cae-mm{word[1:]}').extras if word.startswith('.[') else ()
        assert EXTRAS_REQUIRE.keys() >= set(extras)


PROGRAM_CHECKS = {
    'curl': lambda words, monkeypatch: None,  # fetched by nobody
    'make': check_make,
    'mim': check_mim,
    'pip': check_pip,
    'python': check_python,
    'slurm_train.sh': check_slurm,
    'torchrun': check_torchrun,
}


@pytest.mark.parametrize('page', SHELLS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_read(page, tmp_path, monkeypatch):
    for block, *words in run_shell(page, tmp_path):
        words = [re.sub(r'^\[|^([^[]*)\]$', r'\1', word) for word in words]  # what may be left out
        words = [PLACEHOLDERS.get(word, word) for word in words]
        program, *words = filter(None, words)
        try:
            if program in PROGRAM_CHECKS:
                PROGRAM_CHECKS[program](words, monkeypatch)
            else:  # options alone
                options = [word for word in (program, *words) if word != '--cfg-options']
                check_python(
                    ['tools/train.py', FRAGMENTS[page.stem], '--cfg-options', *options], monkeypatch
                )
        except (Exception, SystemExit) as error:
            raise AssertionError(f'{block}: {program} {" ".join(words)}') from error


# --- what is said in several places


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == __version__
    [paper] = citation['references']
    text = (ROOT / 'docs/method.md').read_text()
    for author in paper['authors']:
        assert f'{author["family-names"]}, {author["given-names"]}' in text
    assert paper['url'].rpartition('/')[2] in text and f'title   = {{{paper["title"]}}}' in text
