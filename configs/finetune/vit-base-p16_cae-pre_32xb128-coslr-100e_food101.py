"""Fine-tuning of CAE-B on Food-101, as on ImageNet-1k (paper)."""

_base_ = './vit-base-p16_cae-pre_32xb128-coslr-100e_in1k.py'

model = dict(data_preprocessor=dict(num_classes=101), head=dict(num_classes=101))
dataset = dict(type='mmpretrain.Food101', data_root='data/food-101/')
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dict(**dataset, split='test'))
test_dataloader = val_dataloader
