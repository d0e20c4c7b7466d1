"""UperNet on CAE-B for your own images and PNG masks.

    python tools/train.py THIS_FILE --cfg-options model.backbone.init_cfg.checkpoint=MY_WEIGHTS

    data/custom/images/train/a.jpg  data/custom/masks/train/a.png
    data/custom/images/val/b.jpg    data/custom/masks/val/b.png

A mask is an 8-bit PNG of one channel or with a palette, as large as its image, whose values are
indices into ``classes``; 255 is ignored.
"""

_base_ = './cae_vit-base_upernet_8xb2-amp-160k_ade20k-512x512.py'

# ---- what to change: the dataset
data_root = 'data/custom/'
train_images, train_masks = 'images/train', 'masks/train'
val_images, val_masks = 'images/val', 'masks/val'
img_suffix, mask_suffix = '.jpg', '.png'
classes = ('background', 'crack', 'rust')
palette = [[0, 0, 0], [230, 60, 60], [60, 120, 230]]  # red, green, blue of each class
# True if 0 in the masks means "not annotated" and 1 the first class, as in ADE20K
reduce_zero_label = False
# ---- what to change: length
updates, warmup, val_interval = 20_000, 1_500, 2_000

dataset = dict(
    _delete_=True,
    type='mmseg.BaseSegDataset',
    data_root=data_root,
    img_suffix=img_suffix,
    seg_map_suffix=mask_suffix,
    metainfo=dict(classes=classes, palette=palette),
    reduce_zero_label=reduce_zero_label,
)
train_dataloader = dict(
    batch_size=4,  # on one GPU: of so many images are batch statistics
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path=train_images, seg_map_path=train_masks),
        pipeline=_base_.train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path=val_images, seg_map_path=val_masks),
        pipeline=_base_.test_pipeline,
    ),
)
test_dataloader = val_dataloader
model = dict(
    decode_head=dict(num_classes=len(classes)), auxiliary_head=dict(num_classes=len(classes))
)
_base_.param_scheduler[0].end = warmup + 1
_base_.param_scheduler[1].end = updates + 1
train_cfg = dict(max_iters=updates, val_interval=val_interval)
default_hooks = dict(checkpoint=dict(interval=val_interval))
auto_scale_lr = dict(base_batch_size=4 * 4)
