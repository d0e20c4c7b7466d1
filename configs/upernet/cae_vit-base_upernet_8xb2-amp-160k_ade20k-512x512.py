"""UperNet on CAE-B of 300 epochs, ADE20K.

    torchrun --nproc-per-node 8 tools/train.py THIS_FILE --launcher pytorch \
        --cfg-options model.backbone.init_cfg.checkpoint=epoch_300.pth

Official: 48.1 mIoU (300 epochs), 49.7 (800), 50.3 (1600).
"""

_base_ = [
    '../_base_/models/upernet_cae_vit-base.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/upernet_adamw_8xb2_160k.py',
    '../_base_/runtime_mmseg.py',
]
