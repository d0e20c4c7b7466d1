"""Thousands of steps of a pretraining with data workers need no more than the first ones."""

import numpy as np
from load_runs import BATCH, KEPT, list_kept, train_watched

EPOCHS, LENGTH = 60, 50
# a step, by a linear fit; memory was seen at 22 to 910 and, of the workers, at 51 to 1800
MOST = dict(bytes=2e3, worker_bytes=4e3)


def test_three_thousand_steps_need_no_more_and_more(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('cae_mm.engine.message_hub.HISTORY', 1000)  # full before the second half
    runner, hook = train_watched(tmp_path, EPOCHS, LENGTH)
    usage = hook.usage
    steps = EPOCHS * LENGTH
    late = [each for each in usage if each.step > steps / 2]
    numbers = [each.step for each in late]
    growth = {key: np.polyfit(numbers, [getattr(x, key) for x in late], 1)[0] for key in MOST}
    own = np.diff([each.own_seconds for each in late if each.step % LENGTH == 0])  # of each epoch
    faster = np.median(own[: len(own) // 2]) / np.median(own[len(own) // 2 :])
    files = sorted((tmp_path / 'run').glob('*.pth'), key=lambda path: path.stat().st_mtime)
    logs = {path.suffix: path.stat().st_size for path in (tmp_path / 'run').glob('*/*.log')}
    logs |= {path.name: path.stat().st_size for path in (tmp_path / 'run').glob('*/vis_data/s*')}
    kept = list_kept(hook.held)
    seconds = usage[-1].seconds - usage[0].seconds
    with capsys.disabled():
        last = usage[-1]
        print(
            f'\n{steps} steps in {seconds:.0f} s, {steps * BATCH / seconds:.0f} images/s, '
            f'{EPOCHS} checkpoints. At the end {last.bytes / 1e6:.0f} MB in the main process, '
            f'{last.worker_bytes / 1e6:.0f} MB in its workers. Of {len(set().union(*hook.held))} '
            f'handles, threads and processes {len(hook.held[-1])} were there after the last epoch, '
            f'{len(kept)} of later epochs stayed. In the second half a step added '
            + ', '.join(f'{rate:.2g} {key}' for key, rate in growth.items())
            + f'; the last epochs were {100 * (faster - 1):+.1f} % faster than those before. '
            f'Left are {len(files)} checkpoints of {files[-1].stat().st_size / 1e3:.0f} kB, '
            + ', '.join(f'{size / 1e3:.0f} kB {name}' for name, size in logs.items())
        )
    assert len(hook.held) == EPOCHS and not kept, kept
    histories = runner.message_hub.log_scalars.values()
    assert {len(history.data[0]) for history in histories} == {1000}
    assert all(abs(growth[key]) < most for key, most in MOST.items()), growth
    assert 2 / 3 < faster < 1.5  # of the processor's time, which programs beside it lengthen too
    assert [path.name for path in files] == [f'epoch_{EPOCHS - i}.pth' for i in range(KEPT)][::-1]
    assert all(size < 200 * steps for size in logs.values()), logs  # a line in 50 steps
