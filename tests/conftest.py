"""Fixtures that several files share."""

from collections import OrderedDict

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope


@pytest.fixture(autouse=True)
def no_default_scope(monkeypatch):
    """Start without a default scope: a Runner sets one for good."""
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict())


@pytest.fixture
def plain_config_text(monkeypatch):
    """Leave out yapf, which formats each config five times a run and takes most of the time."""
    monkeypatch.setattr(Config, 'pretty_text', property(repr))
