"""UperNet on ViT-B/16 at 512 px, 150 classes (official upernet_cae_base_12_512_slide_160k)."""

crop_size = (512, 512)
model = dict(
    type='mmseg.EncoderDecoder',
    data_preprocessor=dict(
        type='mmseg.SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],  # as in pretraining
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=crop_size,
        pad_val=0,
        seg_pad_val=255,
        # smaller images are filled up as in training; the official code takes none of them
        test_cfg=dict(size=crop_size),
    ),
    backbone=dict(
        type='cae_mm.CAEViT',
        arch='base',
        img_size=512,
        pretrain_img_size=224,
        patch_size=16,
        drop_path_rate=0.1,
        out_indices=(3, 5, 7, 11),
        out_type='featmap',
        use_rel_pos_bias=True,
        final_norm=False,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/cae_vit-base-p16_32xb64-amp-coslr-300e_in1k/epoch_300.pth',
            prefix='backbone.',
        ),
    ),
    neck=dict(type='cae_mm.ViTFeaturePyramid', in_channels=768, norm_cfg=dict(type='SyncBN')),
    decode_head=dict(
        type='cae_mm.models.uper_head.UPerHead',  # mmseg.UPerHead at a lower price
        in_channels=[768] * 4,
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=768,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type='SyncBN'),
        align_corners=False,
        loss_decode=dict(type='mmseg.CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type='mmseg.FCNHead',
        in_channels=768,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type='SyncBN'),
        align_corners=False,
        loss_decode=dict(type='mmseg.CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(341, 341)),
)
