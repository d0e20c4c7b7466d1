"""CAE-S for few images of your own: what benchmarks/studies/imagenette64_choice.yml came to.

    python tools/train.py THIS_FILE --cfg-options settings.data_root=MY_IMAGES

Against the paper: pixels normalised per patch instead of tokens, 75 % masked at random instead of
50 % in blocks, one block of half the width each in regressor and decoder instead of four of the
full width, no alignment (lambda = 2), no layer scale (0.1), beta_2 = 0.95 (0.999), and a patch
embedding that starts four times as large. An image costs a quarter of the operations of a CAE-S
with tokens of its own d-VAE, so the same budget sees it four times as often.
"""

_base_ = './cae-rgb-norm_vit-base-p16_4xb128-amp-coslr-300e_custom.py'

from cae_mm.engine.settings import apply_settings

lr = 1e-3  # not searched at this size; 4 blocks of width 128, batch 64: 2e-3 as good, 4e-3 worse

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=384, depth=12, num_heads=6, layer_scale=None),
        xavier_patch_embed=True,
    ),
    neck=dict(
        in_dims=384,
        embed_dims=192,
        num_heads=3,
        regressor_depth=1,
        decoder_depth=1,
        layer_scale=None,
    ),
    head=dict(align_weight=0.0),
)
apply_settings(_base_, mask_ratio=0.75, transforms=dict(CAEMaskGenerator=dict(strategy='random')))
optim_wrapper = dict(optimizer=dict(lr=lr, betas=(0.9, 0.95)))
_base_.param_scheduler[0].start_factor = 1e-6 / lr
