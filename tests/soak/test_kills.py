"""One run that is killed at many random moments, and its files damaged, against one that is not."""

import os
import random
import re
import signal
import time
from pathlib import Path

from interrupted import CAE, read_losses, run, same_weights, start
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

KILLS, EPOCHS = 40, 20


@HOOKS.register_module()
class Pause(Hook):
    """Stand for the work of a real step."""

    def after_train_iter(self, *_, **__):
        time.sleep(0.02)


def count_steps(noted: Path) -> int:
    return noted.read_text().count('\n') if noted.exists() else 0


def damage(path: Path, rng: random.Random) -> None:
    """As a power cut does that comes before the disk has all."""
    size = path.stat().st_size
    if rng.random() < 0.5:
        os.truncate(path, rng.randrange(size))
    else:
        with path.open('r+b') as file:
            file.seek(size // 2)
            file.write(rng.randbytes(4096))


def test_forty_kills_change_nothing(tmp_path, capsys):
    rng = random.Random(0)
    changes = dict(
        CAE, gathered=4, train_cfg=dict(by_epoch=True, max_epochs=EPOCHS), log_level='WARNING'
    )
    changes['hooks'] = [*CAE['hooks'], dict(type='Pause')]
    run('cae', tmp_path / 'whole', **changes)
    folder, noted = tmp_path / 'run', tmp_path / 'run.losses0'
    begun, unfinished, damaged = time.time(), 0, 0
    for kill in range(KILLS):
        before, target = count_steps(noted), rng.choice([0, 1, 2, 5, 9])
        process = start(run, 'cae', folder, workers=rng.choice([0, 2]), resume=True, **changes)
        while process.is_alive() and target and count_steps(noted) < before + target:
            time.sleep(0.001)
        if target and kill % 2:  # while a file is written
            while process.is_alive() and not list(folder.glob('*.unfinished')):
                pass
        else:  # at any moment, or while it starts
            time.sleep(rng.random() * (0.1 if target else 1.0))
        assert process.is_alive(), 'it should not have ended before it is killed'
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        files = sorted(folder.glob('*.pth'), key=os.path.getmtime)
        unfinished += len(list(folder.glob('*.unfinished')))
        if kill % 4 == 3 and len(files) > 1:
            damage(files[-1], rng)
            damaged += 1
    run('cae', folder, **changes, resume=True)
    losses, expected = read_losses(folder), read_losses(tmp_path / 'whole')
    assert losses == expected and len(losses) == 6 * EPOCHS
    last = [Path((path / 'last_checkpoint').read_text()) for path in (folder, tmp_path / 'whole')]
    same_weights(*last)
    logs = ''.join(path.read_text() for path in folder.glob('*/*.log'))
    named = len(re.findall('is damaged .*: the one before is taken', logs))
    steps = count_steps(noted)
    with capsys.disabled():
        print(
            f'\n{KILLS} kills ({unfinished} while a file was written), {damaged} files damaged '
            f'({named} warnings), {steps} steps for {len(losses)}: losses, weights and states are '
            f'those of the run that nothing disturbed; {time.time() - begun:.0f} s'
        )
