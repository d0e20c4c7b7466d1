"""Reading, writing and loading weights: strictly, and without ever running code from a file."""

from cae_mm.checkpoints.files import read_plain_pickle, read_state_dict
from cae_mm.checkpoints.pretrained import PretrainedModule, load_pretrained

__all__ = ['PretrainedModule', 'load_pretrained', 'read_plain_pickle', 'read_state_dict']
