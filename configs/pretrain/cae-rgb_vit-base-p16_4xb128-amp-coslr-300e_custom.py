"""CAE-B on your own images, pixels as targets: no tokenizer, one view.

python tools/train.py THIS_FILE --cfg-options settings.data_root=MY_IMAGES

The folder may be flat or have sub-folders.
"""

_base_ = './cae-dvae_vit-base-p16_4xb128-amp-coslr-300e_custom.py'

from cae_mm.engine.settings import apply_settings

model = dict(
    neck=dict(out_dims=16 * 16 * 3),
    target_generator=dict(_delete_=True, type='cae_mm.RGBTarget'),
)
apply_settings(_base_, transforms=dict(TwoViewResizedCrop=dict(second_size=None)))
