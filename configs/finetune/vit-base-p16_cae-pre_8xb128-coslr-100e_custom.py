"""Fine-tuning of CAE-B on your own classes: MY/train/CLASS/*.jpg and MY/val/CLASS/*.jpg.

    python tools/train.py THIS_FILE --cfg-options model.backbone.init_cfg.checkpoint=CHECKPOINT \
        settings.data_root=MY model.head.num_classes=7 model.data_preprocessor.num_classes=7

Classes are the names of the sub-folders, in alphabetical order.
"""

_base_ = './vit-base-p16_cae-pre_32xb128-coslr-100e_in1k.py'

batch = 8 * 128
lr = 8e-3 * batch / 4096
num_classes = 10

model = dict(data_preprocessor=dict(num_classes=num_classes), head=dict(num_classes=num_classes))
dataset = dict(_delete_=True, type='mmpretrain.CustomDataset', data_root='data/custom/')
train_dataloader = dict(
    drop_last=False,  # a small folder may hold less than a batch
    dataset=dict(**dataset, data_prefix='train', pipeline=_base_.train_pipeline),
)
val_dataloader = dict(
    dataset=dict(**dataset, data_prefix='val', pipeline=_base_.test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))  # five classes may be all there are
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=lr))
_base_.param_scheduler[0].start_factor = _base_.param_scheduler[1].eta_min_ratio = 1e-6 / lr
auto_scale_lr = dict(base_batch_size=batch)
