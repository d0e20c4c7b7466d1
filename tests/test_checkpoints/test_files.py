"""Reading files as plain data: what a Runner's checkpoint holds beside the weights."""

import pytest
import torch
from mmengine.logging import HistoryBuffer

from cae_mm.checkpoints.files import read_plain_pickle, read_state_dict


@pytest.mark.parametrize('foreign', [{}, {'mean': 'mean', 'min': None}])
def test_history_is_read_and_the_running_log_stays_whole(tmp_path, monkeypatch, foreign):
    """A history that is unpickled gives its statistics to all histories, so mmengine does it."""
    path = tmp_path / 'epoch_1.pth'
    history, running = HistoryBuffer([1.0, 4.0], [1, 1]), HistoryBuffer([2.0, 4.0], [1, 1])
    with monkeypatch.context() as patch:
        for name, method in foreign.items():
            patch.setitem(HistoryBuffer._statistics_methods, name, method)
        torch.save(dict(state_dict={}, message_hub=dict(log_scalars=dict(loss=history))), path)
    assert read_state_dict(path) == {}
    values = {name: running.statistics(name) for name in ('min', 'max', 'mean', 'current')}
    assert values == {'min': 2, 'max': 4, 'mean': 3, 'current': 4}
    content = read_plain_pickle(path)
    assert content['message_hub']['log_scalars']['loss'].statistics('mean') == 2.5


@pytest.mark.parametrize('content', [b'', b'hello', b'<html>not found</html>'])
def test_what_is_no_checkpoint_at_all_is_called_so(tmp_path, content):
    path = tmp_path / 'a.pth'
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match='a.pth was refused.*: it is no file that torch.save wrote'
    ):
        read_state_dict(path)
