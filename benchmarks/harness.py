"""What all benchmarks share: turns, peaks of fresh processes, rows of the table, the machine.

A benchmark is a file ``bench_*.py`` with ``measure(options) -> list[Row]`` that ends with
``main(measure, __doc__)``. It runs alone, or as one part of ``make bench`` (``table.py``).
"""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cae_mm.precision import choose_precision

console = Console(width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        what: What was measured, with sizes and precision.
        reached: The number.
        target: What is to be reached; None for numbers that explain others.
        at_most: Whether smaller is better.
        unit: Behind the number: 'x' for ratios.
        detail: The absolute numbers behind a ratio, for the curious.
    """

    what: str
    reached: float
    target: float | None = None
    at_most: bool = False
    unit: str = 'x'
    detail: str = ''

    @property
    def verdict(self) -> str:
        """Whether the target was reached."""
        if self.target is None:
            return ''
        reached = self.reached <= self.target if self.at_most else self.reached >= self.target
        return 'yes' if reached else 'NO'


@dataclass(frozen=True)
class Options:
    """Options of every benchmark.

    Args:
        rounds: Timed turns of each variant.
        device: 'cuda' where there is one, else 'cpu'.
        warm_up: Turns before those.
    """

    rounds: int
    device: str
    warm_up: int = 1


def alternate(steps: Mapping[str, Callable[[], object]], options: Options) -> dict[str, float]:
    """Median seconds of each step, taken in turns so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(options.warm_up + options.rounds):
        for name, step in steps.items():
            synchronize(options.device)
            start = time.perf_counter()
            step()
            synchronize(options.device)
            if i >= options.warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == 'cuda':
        torch.cuda.synchronize()


def peak_memory(device: str) -> float:
    """Peak of this process in GB: of the GPU where there is one, else resident."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def serve(step: Callable[[], object], device: str) -> None:
    """Time a step for each line of stdin, at its end print the peak: a process of ``in_turns``."""
    for _ in sys.stdin:
        print(json.dumps(alternate({'step': step}, Options(1, device, warm_up=0))['step']))
        sys.stdout.flush()
    print(json.dumps(peak_memory(device)))


def in_turns(script: str, names: Sequence[str], options: Options) -> tuple[dict, dict]:
    """Seconds and peaks in GB of variants that take turns, each in a process of its own.

    So none works in a heap that another has cut up, and each has its own peak. The script is
    started with ``--serve NAME`` and calls ``serve``.
    """
    command = [sys.executable, script, '--serve']
    pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(subprocess.Popen([*command, name], **pipes)) for name in names
        }

        def ask(process: subprocess.Popen) -> float:
            for line in process.stdout:
                if re.fullmatch(r'[\d.e-]+\n', line):  # not what packages print on import
                    return float(line)
            raise RuntimeError(f'{" ".join(process.args)} failed')

        seconds: dict[str, list[float]] = {name: [] for name in names}
        for i in range(options.warm_up + options.rounds):
            for name, process in processes.items():
                process.stdin.write('step\n')
                answer = ask(process)
                if i >= options.warm_up:
                    seconds[name].append(answer)
        peaks = {}
        for name, process in processes.items():
            process.stdin.close()
            peaks[name] = ask(process)
    return {name: median(values) for name, values in seconds.items()}, peaks


def in_fresh_process(script: str, *arguments: str) -> Any:
    """Run a benchmark's file with ``arguments`` and return the JSON of its last line.

    A process' peak never falls, so each peak needs a process of its own.
    """
    command = [sys.executable, script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f'{" ".join(command)} failed:\n{result.stderr}')
    return json.loads(result.stdout.splitlines()[-1])


def describe_machine() -> str:
    """Name the processor or the GPU, its instructions, torch and the precision that it gets."""
    precision = choose_precision()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f'{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}'
    threads = f'{torch.get_num_threads()} of {os.cpu_count()} cores'
    return f'{name}, {threads}, torch {torch.__version__}, precision {precision}'


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    match = re.search(r'model name\s*:\s*(.+)', info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor() or 'CPU'


def print_rows(rows: Sequence[Row], title: str) -> None:
    """Print rows as a table."""
    table = Table('what', 'reached', 'target', '', 'measured', title=title)
    for row in rows:
        sign = '<=' if row.at_most else '>='
        target = '' if row.target is None else f'{sign} {row.target:g}{row.unit}'
        reached = f'{row.reached:.3g}{row.unit}'
        table.add_row(row.what, reached, target, row.verdict, row.detail)
    console.print(table)


def main(measure: Callable[[Options], list[Row]], doc: str) -> None:
    """Run one benchmark from the command line."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5, help='timed turns of each variant')
    parser.add_argument('--json', type=Path, help='also write the rows to this file')
    args = parser.parse_args()
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    rows = measure(Options(args.rounds, device))
    print_rows(rows, describe_machine())
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows]))
