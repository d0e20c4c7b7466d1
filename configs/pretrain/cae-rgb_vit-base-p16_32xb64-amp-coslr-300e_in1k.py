"""CAE-B, 300 epochs, pixels as targets (paper, table 8): no tokenizer, one view."""

_base_ = './cae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'

model = dict(
    neck=dict(out_dims=16 * 16 * 3),
    target_generator=dict(_delete_=True, type='cae_mm.RGBTarget'),
)
_base_.train_dataloader.dataset.pipeline[2].second_size = None
