"""Start-up: importing cae_mm, and from the command line to the end of the first iteration.

    python benchmarks/bench_startup.py           # or: make bench

Each time is that of a fresh process; variants take turns. The runs are CAE-B with DALL-E's
tokenizer, random weights, float32, two images a step and two data workers, by our tools/train.py
and by mmpretrain's, each with its own config.
"""

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from harness import Options, Row, in_fresh_process, main
from PIL import Image

ROOT = Path(__file__).parent.parent
# what a run imports
MODULES = [f'cae_mm.{name}' for name in ('registry', 'models', 'datasets', 'engine', 'hooks')]
TURNS = 3  # of seconds each

# mmpretrain's config; its mixed precision wants a GPU
THEIR_CONFIG = """
_base_ = {base!r}
_base_.optim_wrapper.pop('loss_scale')
optim_wrapper = dict(type='OptimWrapper')
train_dataloader = dict(dataset=dict(data_root={root!r}))
"""


def time_imports(*modules: str) -> dict[str, float]:
    """Import ``modules`` in a fresh process; return the seconds of each module by itself."""
    code = f'import {", ".join(modules)}'
    command = [sys.executable, '-W', 'ignore', '-X', 'importtime', '-c', code]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    lines = re.findall(r'^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$', text, re.MULTILINE)
    return {name: int(microseconds) / 1e6 for microseconds, name in lines}


def time_ours(*modules: str) -> float:
    """Seconds that importing ``modules`` spends in modules of cae_mm, median of fresh processes."""
    turns = [time_imports(*modules) for _ in range(TURNS)]
    ours = ({name: s for name, s in turn.items() if name.startswith('cae_mm')} for turn in turns)
    return median(sum(each.values()) for each in ours)


def run_first_iteration(start: float, tool: str, *arguments: str) -> None:
    """Run a tool's command line up to its first iteration; print the seconds since ``start``."""
    from mmengine.runner import EpochBasedTrainLoop

    run_iter = EpochBasedTrainLoop.run_iter

    def run_and_leave(*args: Any) -> None:
        run_iter(*args)
        print(json.dumps(time.time() - start), flush=True)
        os._exit(0)

    EpochBasedTrainLoop.run_iter = run_and_leave
    sys.argv = [tool, *arguments]
    runpy.run_path(tool, run_name='__main__')


def make_commands(folder: Path) -> dict[str, list[str]]:
    """Make images, and the command lines that train on them."""
    data = folder / 'data'
    rng = np.random.default_rng(0)
    names = [f'{i}.jpg' for i in range(16)]
    for subfolder in ('train', 'meta'):
        (data / subfolder).mkdir(parents=True)
    for name in names:
        pixels = rng.integers(256, size=(375, 500, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / 'train' / name)
    (data / 'meta/train.txt').write_text(''.join(f'{name} 0\n' for name in names))
    theirs = folder / 'theirs.py'
    installed = Path(find_spec('mmpretrain').origin).parent / '.mim'
    base = installed / 'configs/cae/cae_beit-base-p16_8xb256-amp-coslr-300e_in1k.py'
    theirs.write_text(THEIR_CONFIG.format(base=str(base), root=str(data)))
    ours = ROOT / 'configs/pretrain/cae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'
    loader = ['train_dataloader.batch_size=2', 'train_dataloader.num_workers=2']
    options = ['--work-dir', folder, '--cfg-options', 'model.target_generator.init_cfg=None']
    # their precision, and an update in each step
    same = ['optim_wrapper.dtype=float32', 'auto_scale_lr.enable=False']
    root = f'settings.data_root={data}'
    return {
        'cae-mm': [ROOT / 'tools/train.py', ours, *options, *loader, *same, root],
        'mmpretrain': [installed / 'tools/train.py', theirs, *options, *loader],
    }


def measure(options: Options) -> list[Row]:
    """Time imports and first iterations."""
    alone, run = time_ours('cae_mm'), time_ours(*MODULES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = make_commands(folder)
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(TURNS):
            for name, command in commands.items():
                arguments = ['first-iteration', repr(time.time()), *map(str, command)]
                seconds[name].append(in_fresh_process(__file__, *arguments))
    ours, theirs = (median(seconds[name]) for name in ('cae-mm', 'mmpretrain'))
    detail = f'all that a run imports: {run:.3f} s'
    what = 'command line to first iteration, CAE-B, mmpretrain : cae-mm'
    return [
        Row('import cae_mm beyond its dependencies', alone, 0.1, True, ' s', detail),
        Row(what, theirs / ours, 1.0, detail=f'{theirs:.2f} -> {ours:.2f} s'),
    ]


if __name__ == '__main__':
    match sys.argv[1:]:
        case ['first-iteration', start, *command]:
            run_first_iteration(float(start), *command)
        case _:
            main(measure, __doc__)
