"""CAE-B on an own folder of images on one GPU, pixels as targets: no tokenizer, one view.

python tools/train.py THIS_FILE --cfg-options train_dataloader.dataset.data_root=MY_IMAGES
"""

_base_ = './cae-dvae_vit-base-p16_1xb128-accum4-amp-coslr-300e_custom.py'

model = dict(
    neck=dict(out_dims=16 * 16 * 3),
    target_generator=dict(_delete_=True, type='cae_mm.RGBTarget'),
)
_base_.train_dataloader.dataset.pipeline[2].second_size = None
