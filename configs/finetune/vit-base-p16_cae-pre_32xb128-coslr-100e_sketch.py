"""Fine-tuning of CAE-B on Sketch of DomainNet (345 classes), as on ImageNet-1k (paper)."""

_base_ = './vit-base-p16_cae-pre_32xb128-coslr-100e_clipart.py'

train_dataloader = dict(dataset=dict(ann_file='sketch_train.txt'))
val_dataloader = dict(dataset=dict(ann_file='sketch_test.txt'))
test_dataloader = val_dataloader
