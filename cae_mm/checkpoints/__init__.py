"""Reading weights: strictly, and without ever running code from a file."""

from cae_mm.checkpoints.loading import PretrainedMixin, load_pretrained, read_state_dict

__all__ = ['PretrainedMixin', 'load_pretrained', 'read_state_dict']
