"""Weights in and out: strictly, and without ever running code from a file."""

from cae_mm.checkpoints.files import read_plain_pickle, read_state_dict
from cae_mm.checkpoints.hook import SafeLoadHook
from cae_mm.checkpoints.loading import PretrainedModule, load_pretrained

__all__ = [
    'PretrainedModule',
    'SafeLoadHook',
    'load_pretrained',
    'read_plain_pickle',
    'read_state_dict',
]
