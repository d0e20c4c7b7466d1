"""CAE-B on your own images, pixels normalised per patch as targets (MAE): no tokenizer, one view.

python tools/train.py THIS_FILE --cfg-options settings.data_root=MY_IMAGES

The folder may be flat or have sub-folders.
"""

_base_ = './cae-rgb_vit-base-p16_4xb128-amp-coslr-300e_custom.py'

model = dict(target_generator=dict(norm_patch=True))
