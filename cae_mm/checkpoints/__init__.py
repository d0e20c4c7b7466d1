"""Reading weights: strictly, and without ever running code from a file."""

from cae_mm.checkpoints.loading import PretrainedModule, load_pretrained, read_state_dict

__all__ = ['PretrainedModule', 'load_pretrained', 'read_state_dict']
