"""The bar of a training: from the first step on, at the place where a resumed run goes on."""

import io
import logging
import sys
from types import SimpleNamespace

import pytest
from mmengine.logging import MessageHub

from cae_mm.hooks import ProgressHook


class Terminal(io.StringIO):
    def isatty(self):
        return True


def train(monkeypatch, stream, steps, start=0, processes=1):
    """Steps of half a second with 4 images in each process; the message hub's numbers."""
    monkeypatch.setattr(sys, 'stderr', stream)
    monkeypatch.setattr('cae_mm.hooks.progress.get_world_size', lambda: processes)
    hub = MessageHub(f'progress{id(stream)}')
    runner = SimpleNamespace(
        model_name='CAE', iter=start, max_iters=10, message_hub=hub, logger=logging.getLogger('run')
    )
    hook = ProgressHook()
    hook.before_train(runner)
    for _ in range(steps):
        hub.update_scalar('train/time', 0.5)
        hub.update_scalar('train/loss', 7.5)
        hook.after_train_iter(runner, runner.iter, {'data_samples': [None] * 4})
        runner.iter += 1
        runner.logger.warning('a line of the log')
    hook.after_train(runner)
    return hub


@pytest.mark.parametrize('processes', [1, 4])
def test_throughput_counts_all_processes(monkeypatch, processes):
    hub = train(monkeypatch, io.StringIO(), 3, processes=processes)
    assert hub.get_scalar('train/images_per_s').current() == 8 * processes


@pytest.mark.parametrize('stream', [io.StringIO, Terminal])
def test_first_step_shows_time_left_loss_and_speed(monkeypatch, stream):
    output = stream()
    train(monkeypatch, output, 1)
    shown = output.getvalue()
    assert 'CAE:   0%' in shown and ' 0/10 [' in shown
    first = next(text for text in shown.split('\r') if ' 1/10 [' in text)
    assert 'loss 7.5, 8 images/s' in first and '<?' not in first


def test_a_file_has_few_lines(monkeypatch):
    """One at the start, after the first step, and at the end; the ten steps take no ten seconds."""
    output = io.StringIO()
    train(monkeypatch, output, 10)
    assert 3 <= output.getvalue().count('/10 [') <= 4
    assert '10/10 [' in output.getvalue()


def test_resumed_run_goes_on_where_it_was(monkeypatch):
    output = io.StringIO()
    train(monkeypatch, output, 3, start=7)
    assert ' 7/10 [' in output.getvalue() and ' 8/10 [' in output.getvalue()
    assert '10/10 [' in output.getvalue() and ' 0/10 [' not in output.getvalue()


def test_log_of_a_terminal_goes_above_the_bar(monkeypatch):
    """Each line of the log stands alone: the bar is cleared before, and painted after it."""
    output = Terminal()
    logger = logging.getLogger('run')
    handler = logging.StreamHandler(output)
    logger.addHandler(handler)
    monkeypatch.setattr(sys, 'stdout', output)
    try:
        train(monkeypatch, output, 2)
        assert logger.handlers == [handler]  # as before
    finally:
        logger.removeHandler(handler)
    lines = output.getvalue().split('\n')
    assert sum(line.rpartition('\r')[2] == 'a line of the log' for line in lines) == 2


@pytest.mark.parametrize('rank', [0, 1])
def test_only_the_first_process_shows_a_bar(monkeypatch, rank):
    monkeypatch.setattr('mmengine.dist.utils.get_rank', lambda group=None: rank)
    output = io.StringIO()
    hub = train(monkeypatch, output, 2)
    assert ('/10 [' in output.getvalue()) == (rank == 0)
    assert hub.get_scalar('train/images_per_s').current() == 8
