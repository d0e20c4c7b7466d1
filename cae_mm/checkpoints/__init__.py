"""Reading, writing and loading weights: strictly, and without ever running code from a file.

Importing it makes all loads through mmengine so, see ``schemes``.
"""

from cae_mm.checkpoints import schemes  # noqa: F401
from cae_mm.checkpoints.description import EncoderDescription
from cae_mm.checkpoints.files import Checkpoint, read_checkpoint
from cae_mm.checkpoints.pretrained import PretrainedModule, load_pretrained
from cae_mm.checkpoints.unpickler import read_plain_pickle

__all__ = [
    'Checkpoint',
    'EncoderDescription',
    'PretrainedModule',
    'load_pretrained',
    'read_checkpoint',
    'read_plain_pickle',
]
