"""Of two processes one is killed, stopped, stalls or has no memory: the other says so and ends."""

import os
import re
import signal

import pytest
from interrupted import CAE, read_losses, run, same_weights
from watched_runs import launch, start_two

# which process has what fault, and what the other says; seconds until nobody gets on
FAULTS = {
    ('killed', 1): ('no sign of life of rank 1 (process {} on .*It was killed', 40),
    ('stopped', 0): ('no sign of life of rank 0 (process {} on .*or stopped', 40),
    ('stalled', 0): ('nobody has got on for 6 s; the others wait for rank 0 (process {}', 6),
    ('circles', 1): ('nobody has got on for 6 s; the others wait for rank 1 (process {}', 6),
    ('memory', 1): ("rank 1 failed (process {} .*can't allocate memory.*Take less", 40),
    ('storage', 1): (
        'rank 1 failed (process {} .*reset by peer: storage.*Mend that',
        40,
    ),
    ('memory', 0): ("rank 0 failed (process {} .*can't allocate memory.*Take less", 40),
}


@pytest.fixture(scope='module')
def ended(tmp_path_factory):
    """Status of the other process, number of the one with the fault, and what the other said."""
    folder = tmp_path_factory.mktemp('faults')
    pairs = {}
    for (kind, rank), (_, timeout) in FAULTS.items():
        pairs[kind, rank] = start_two(kind, folder / f'{kind}{rank}', timeout, rank=rank)
    results = {}
    for (kind, rank), pair in pairs.items():
        other, faulty = pair[1 - rank], pair[rank]
        other.join(60)
        if faulty.is_alive():
            os.kill(faulty.pid, signal.SIGKILL)
        faulty.join()
        said = (folder / f'{kind}{rank}/err{1 - rank}').read_text()
        results[kind, rank] = other.exitcode, faulty.pid, said
    return results


@pytest.mark.parametrize('fault', FAULTS)
def test_the_other_ends_and_names_it(fault, ended):
    status, number, said = ended[fault]
    told = f'rank {1 - fault[1]} ends: {FAULTS[fault][0].format(number)}'.replace('(', r'\(')
    assert status == 1
    assert re.search(told, said, re.DOTALL), said


def test_torchrun_brings_a_run_to_the_same_weights(tmp_path, monkeypatch):
    """One process is killed in the middle of an epoch; without --resume nothing is overwritten."""
    launch(tmp_path / 'whole', [])
    fault = dict(kind='killed', at=4, rank=0, file=str(tmp_path / 'fault'))
    launch(tmp_path / 'killed', [fault], resume=True)
    for rank in range(2):
        whole, killed = (read_losses(tmp_path / name, rank) for name in ('whole', 'killed'))
        assert killed == whole and len(whole) == 9
    same_weights(*(tmp_path / name / 'epoch_3.pth' for name in ('whole', 'killed')))
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    with pytest.raises(
        ValueError, match='started this run again, and .*killed has .* add --resume'
    ):
        run('cae', tmp_path / 'killed', **CAE)
