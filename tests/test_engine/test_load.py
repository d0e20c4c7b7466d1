"""What a run holds does not grow; the long form is in tests/soak."""

import pytest
from load_runs import KEPT, train_watched

HISTORY = 15


@pytest.mark.usefixtures('plain_config_text')
def test_handles_threads_files_and_histories_stay_as_many(tmp_path, monkeypatch):
    monkeypatch.setattr('cae_mm.engine.message_hub.HISTORY', HISTORY)
    runner, usage = train_watched(tmp_path, epochs=KEPT + 2, length=10)
    middles = [each for each in usage if each.step % 10 == 5]
    assert len({each.handles for each in middles}) == len({each.threads for each in middles}) == 1
    kept = {f'epoch_{KEPT + 2 - i}.pth' for i in range(KEPT)}
    assert {path.name for path in (tmp_path / 'run').glob('*.pth')} == kept
    histories = runner.message_hub.log_scalars
    assert {len(history.data[0]) for history in histories.values()} == {HISTORY}
