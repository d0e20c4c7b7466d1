"""CAE-B, 300 epochs, pixels as targets (paper, table 8): no tokenizer, one view."""

_base_ = './cae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'

from cae_mm.engine.settings import apply_settings

model = dict(
    neck=dict(out_dims=16 * 16 * 3),
    target_generator=dict(_delete_=True, type='cae_mm.RGBTarget'),
)
apply_settings(_base_, transforms=dict(TwoViewResizedCrop=dict(second_size=None)))
