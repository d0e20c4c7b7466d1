"""Fixtures that several files share."""

import pytest
from mmengine.config import Config


@pytest.fixture
def plain_config_text(monkeypatch):
    """Leave out yapf, which formats each config five times a run and takes most of the time."""
    monkeypatch.setattr(Config, 'pretty_text', property(repr))
