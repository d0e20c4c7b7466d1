"""Runs of two forked processes of which one gets a real fault."""

import itertools
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
from interrupted import CAE, run, start
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cae_mm.engine import runner, watch

FAULTS = {  # what a process does to itself
    'killed': lambda: os.kill(os.getpid(), signal.SIGKILL),  # as the kernel does without memory
    'stopped': lambda: os.kill(os.getpid(), signal.SIGSTOP),
    'stalled': lambda: time.sleep(3600),
    'circles': lambda: any(n < 0 for n in itertools.count()),
    'memory': lambda: torch.empty(2**50),
    'storage': lambda: (_ for _ in ()).throw(ConnectionError('Connection reset by peer: storage')),
}


@HOOKS.register_module()
class Fault(Hook):
    """One process has a fault in a step, once; the time is that of ``file``."""

    priority = 'VERY_HIGH'

    def __init__(self, kind: str, at: int, rank: int, file: str) -> None:
        self.kind, self.at, self.rank, self.file = kind, at, rank, Path(file)

    def before_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        """Have it."""
        if (runner.iter, get_rank()) == (self.at, self.rank) and not self.file.exists():
            self.file.touch()
            FAULTS[self.kind]()


def start_two(kind: str, folder: Path, timeout: float, at: int = 3, rank: int = 1) -> list[Any]:
    """Start two processes of a run; each writes its standard error to ``folder/err0, 1``."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    fault = dict(type='Fault', kind=kind, at=at, rank=rank, file=str(folder / 'fault'))
    return [start(_run_one, i, port, folder, timeout, fault) for i in range(2)]


def _run_one(rank: int, port: int, folder: Path, timeout: float, fault: dict[str, Any]) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    os.environ |= dict(MASTER_ADDR='localhost', MASTER_PORT=str(port))
    os.environ |= dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')  # mmengine warns
    sys.stderr = open(folder / f'err{rank}', 'w', buffering=1)
    if fault['kind'] in ('stalled', 'circles'):
        watch.SILENT = 100 * watch.BEATS  # beats are few milliseconds here
        runner.RESERVE = 2
    run('linear', folder / 'run', 2, hooks=[fault], env_cfg=dict(dist_cfg=dict(timeout=timeout)))


def launch(folder: Path, faults: list[dict[str, Any]], **changes: Any) -> None:
    """Train in two forked processes of torchrun's agent, which starts both again after a fault."""
    config = LaunchConfig(
        *(1, 1, 2),
        rdzv_backend='c10d',
        rdzv_endpoint='localhost:0',
        start_method='fork',
        max_restarts=len(faults),
        monitor_interval=0.1,
    )
    elastic_launch(config, _run_launched)(folder, faults, changes)


def _run_launched(folder: Path, faults: list[dict[str, Any]], changes: dict[str, Any]) -> None:
    os.environ |= dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
    hooks = [*CAE['hooks'], *(dict(type='Fault', **fault) for fault in faults)]
    dist = dict(dist_cfg=dict(timeout=40))
    run('cae', folder, 2, **CAE | changes | dict(hooks=hooks, env_cfg=dist))
