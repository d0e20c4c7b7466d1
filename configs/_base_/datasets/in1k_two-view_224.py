"""Any folder of images without labels, sub-folders included; here ImageNet-1k's training set.

Two views of one crop: 224 px for the encoder, 112 px for the tokenizer (official code).
"""

train_pipeline = [
    dict(type='cae_mm.LoadImage', on_error='skip'),
    dict(type='cae_mm.TwoViewResizedCrop', size=224, second_size=112, flip_prob=0.5),
    dict(type='cae_mm.CAEMaskGenerator', patch_size=16, mask_ratio=0.5),  # 98 of 196 patches
    dict(type='mmpretrain.PackInputs'),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=8,
    pin_memory=True,
    drop_last=True,  # official
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='mmpretrain.CustomDataset',
        data_root='data/imagenet/',
        data_prefix='train',
        with_label=False,
        extensions=('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.pgm', '.tif', '.tiff', '.webp'),
        pipeline=train_pipeline,
    ),
)
settings = dict(cpu_batch_size=8)
