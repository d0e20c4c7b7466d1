"""Many faults of one of two processes, and runs that torchrun starts again until they are done."""

import os
import random
import re
import signal
import time

from interrupted import read_losses, same_weights
from watched_runs import launch, start_two

ROUNDS, RESTARTS, TIMEOUT = 2, 4, 20
KINDS = ('killed', 'stopped', 'stalled', 'circles', 'memory')


def wait_for(path):
    while not path.exists():
        time.sleep(0.01)
    return path.stat().st_mtime


def test_every_fault_is_named(tmp_path, capfd):
    """At random steps, of either process; seconds from the fault to the end of the other."""
    rng = random.Random(0)
    seconds = {kind: [] for kind in KINDS}
    for number in range(ROUNDS):
        for kind in KINDS:
            rank, folder = number % 2, tmp_path / f'{kind}{number}'
            pair = start_two(kind, folder, TIMEOUT, at=rng.randrange(1, 9), rank=rank)
            began = wait_for(folder / 'fault')
            pair[1 - rank].join(10 * TIMEOUT)
            seconds[kind].append(time.time() - began)
            assert pair[1 - rank].exitcode == 1
            said = (folder / f'err{1 - rank}').read_text()
            assert re.search(f'rank {1 - rank} ends: .*rank {rank} (failed )?\\(', said), said
            if pair[rank].is_alive():
                os.kill(pair[rank].pid, signal.SIGKILL)
            pair[rank].join()
    with capfd.disabled():
        print(f'\nenv_cfg.dist_cfg.timeout={TIMEOUT}, {ROUNDS} times each; seconds to the end:')
        for kind, values in seconds.items():
            print(f'  {kind}: {min(values):.1f} to {max(values):.1f}')


def test_restarts_lead_to_the_same_weights(tmp_path, capfd):
    rng = random.Random(0)
    launch(tmp_path / 'whole', [])
    kills = 0
    for number in range(RESTARTS):
        steps = sorted(rng.sample(range(1, 9), rng.randrange(1, 4)))
        faults = [
            dict(kind='killed', at=at, rank=rng.randrange(2), file=str(tmp_path / f'{number}{at}'))
            for at in steps
        ]
        launch(tmp_path / f'run{number}', faults, resume=True)
        kills += len(faults)
        for rank in range(2):
            losses = [read_losses(tmp_path / name, rank) for name in ('whole', f'run{number}')]
            assert losses[0] == losses[1]
        same_weights(*(tmp_path / name / 'epoch_3.pth' for name in ('whole', f'run{number}')))
    with capfd.disabled():
        print(f'\n{RESTARTS} runs, {kills} kills and restarts: the same losses and weights')
