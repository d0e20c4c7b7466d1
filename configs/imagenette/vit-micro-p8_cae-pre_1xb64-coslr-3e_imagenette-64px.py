"""Fine-tuning for studies on two cores: few epochs, so crops and flips are the only augmentation.

No relative position bias and no layer scale of its own: MAE's encoder, which is judged beside it,
has none either. Scales that were learned in pretraining are loaded and stay as they are.
"""

_base_ = './vit-mini-p16_cae-pre_1xb64-coslr-3e_imagenette-128px.py'

from cae_mm.engine.settings import apply_settings

_base_.model.backbone.update(
    arch=dict(embed_dims=128, depth=4, num_heads=2, layer_scale=None),
    patch_size=8,
    use_rel_pos_bias=False,
)
_base_.model.backbone.init_cfg.checkpoint = (
    'work_dirs/cae-dvae_vit-micro-p8_1xb64-amp-coslr-20e_imagenette-64px/epoch_20.pth'
)
apply_settings(_base_, img_size=64)
_base_.train_pipeline[-3:-1] = []  # colours and erasing
model = dict(head=dict(in_channels=128), train_cfg=None)  # no mixup
train_dataloader = dict(num_workers=1, dataset=dict(pipeline=_base_.train_pipeline))
val_dataloader = dict(num_workers=0)
test_dataloader = val_dataloader
default_hooks = dict(checkpoint=dict(save_best=None, interval=3))
