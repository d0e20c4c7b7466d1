"""Attentive probe of CAE-B: a learned query attends to the patches, SGD (paper).

    torchrun --nproc-per-node 8 ... tools/train.py THIS_FILE --launcher pytorch \
        --cfg-options model.backbone.init_cfg.checkpoint=CHECKPOINT

Paper: 74.0 after 300 epochs of pretraining, 75.9 after 800, 77.2 after 1600.
"""

_base_ = '../linear/vit-base-p16_cae-pre_32xb512-linear-coslr-90e_in1k.py'

model = dict(
    backbone=dict(out_type='raw'), head=dict(type='cae_mm.AttentiveProbeHead', num_heads=12)
)
train_dataloader = dict(batch_size=256)
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type='SGD',
        lr=0.4,
        weight_decay=0.0,
        momentum=0.9,
        nesterov=True,  # official; the paper says momentum only
    )
)
_base_.param_scheduler[1].eta_min = 1e-6  # official
auto_scale_lr = dict(base_batch_size=32 * 256)
