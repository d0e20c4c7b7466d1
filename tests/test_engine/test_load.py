"""What a run holds does not grow; the long form is in tests/soak."""

import pytest
from load_runs import CONFIG, KEPT, list_kept, train_watched

HISTORY = 15


@pytest.mark.usefixtures('plain_config_text')
def test_handles_threads_files_and_histories_stay_as_many(tmp_path, monkeypatch):
    monkeypatch.setattr('cae_mm.engine.message_hub.HISTORY', HISTORY)
    runner, hook = train_watched(tmp_path, epochs=KEPT + 2, length=10)
    assert len(hook.held) == KEPT + 2
    assert not list_kept(hook.held)
    kept = {f'epoch_{KEPT + 2 - i}.pth' for i in range(KEPT)}
    files = {path.name for path in (tmp_path / 'run').iterdir() if path.is_file()}
    assert files == kept | {'last_checkpoint', CONFIG.name}
    histories = runner.message_hub.log_scalars
    assert {len(history.data[0]) for history in histories.values()} == {HISTORY}
