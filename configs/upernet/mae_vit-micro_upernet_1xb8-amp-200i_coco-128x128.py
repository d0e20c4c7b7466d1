"""The same UperNet on mmpretrain's MAE."""

_base_ = './cae_vit-micro_upernet_1xb8-amp-200i_coco-128x128.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=128, num_layers=4, num_heads=2, feedforward_channels=512),
        img_size=64,
        patch_size=8,
        out_indices=(0, 1, 2, 3),
        out_type='featmap',
        final_norm=False,
        norm_cfg=dict(type='LN', eps=1e-6),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/mae_vit-micro-p8_1xb64-amp-coslr-20e_imagenette-64px/'
            'epoch_20.pth',
            prefix='backbone.',
        ),
    )
)
