"""Fixtures that several files share."""

from collections import OrderedDict

import pytest
from hypothesis import Phase, settings
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

# the same cases in each run; no limit of time, as machines are shared
settings.register_profile('tests', derandomize=True, max_examples=40, deadline=None)
settings.load_profile('tests')
# for tests/mutants.py: what fails need not be made small
phases = (Phase.explicit, Phase.generate)
settings.register_profile('mutants', settings.get_profile('tests'), phases=phases)


@pytest.fixture(autouse=True)
def no_default_scope(monkeypatch):
    """Start without a default scope: a Runner sets one for good."""
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict())


@pytest.fixture
def plain_config_text(monkeypatch):
    """Leave out yapf, which formats each config five times a run and takes most of the time."""
    monkeypatch.setattr(Config, 'pretty_text', property(repr))


@pytest.fixture
def log(caplog, monkeypatch):
    """What mmengine's logger says, which does not propagate to pytest's; new, not that of a run."""
    monkeypatch.setattr(MMLogger, '_instance_dict', OrderedDict())
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
