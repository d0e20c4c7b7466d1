"""BEiT (arXiv 2106.08254): encoder, tokens, data, epochs and optimizer of the CAE beside it.

Mask tokens go into the encoder, and one linear layer reads its output. Its own is the mask (40 %).
Positions are fixed ones as CAE's and MAE's; the paper's are relative biases.
"""

_base_ = './cae-dvae_vit-mini-p16_1xb64-amp-coslr-15e_imagenette-128px.py'

from cae_mm.engine.settings import apply_settings

apply_settings(_base_, mask_ratio=0.4)
model = dict(neck=dict(regressor_depth=0, decoder_depth=0), head=dict(align_weight=0.0))
