"""A classifier on an encoder pretrained by CAE, ViT-B/16 at 224 px."""

model = dict(
    type='mmpretrain.ImageClassifier',
    data_preprocessor=dict(
        type='mmpretrain.ClsDataPreprocessor',
        num_classes=1000,
        mean=[123.675, 116.28, 103.53],  # as in pretraining
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
    backbone=dict(
        type='cae_mm.CAEViT',
        arch='base',
        img_size=224,
        patch_size=16,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/cae_vit-base-p16_32xb64-amp-coslr-1600e_in1k/epoch_1600.pth',
            prefix='backbone.',
        ),
    ),
)
