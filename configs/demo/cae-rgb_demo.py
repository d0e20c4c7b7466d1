"""CAE for docs/first_encoder.md: the small ViT of `make demo`, pixels (normalised) as targets."""

_base_ = './cae_demo.py'

from cae_mm.engine.settings import apply_settings

model = dict(
    neck=dict(out_dims=8 * 8 * 3),
    target_generator=dict(_delete_=True, type='cae_mm.RGBTarget', norm_patch=True),
)
apply_settings(_base_, transforms=dict(TwoViewResizedCrop=dict(second_size=None)))
