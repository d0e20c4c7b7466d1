"""Fine-tuning of CAE-B on Clipart of DomainNet (345 classes), as on ImageNet-1k (paper).

Images and the two lists as published on http://ai.bu.edu/M3SDA/: data/domainnet/clipart/... and
data/domainnet/clipart_{train,test}.txt.
"""

_base_ = './vit-base-p16_cae-pre_32xb128-coslr-100e_in1k.py'

model = dict(data_preprocessor=dict(num_classes=345), head=dict(num_classes=345))
dataset = dict(
    _delete_=True,
    type='mmpretrain.CustomDataset',
    data_root='data/domainnet/',
    data_prefix='',
)
train_dataloader = dict(
    dataset=dict(**dataset, ann_file='clipart_train.txt', pipeline=_base_.train_pipeline)
)
val_dataloader = dict(
    dataset=dict(**dataset, ann_file='clipart_test.txt', pipeline=_base_.test_pipeline)
)
test_dataloader = val_dataloader
