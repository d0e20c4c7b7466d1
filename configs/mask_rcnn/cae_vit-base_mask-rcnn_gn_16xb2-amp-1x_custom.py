"""Mask R-CNN on your own data set in COCO's format.

Copy this file, and change the lines below. Annotations need boxes and masks (polygons or RLE).
"""

_base_ = './cae_vit-base_mask-rcnn_gn_16xb2-amp-1x_coco.py'

# ---- what to change: the data
data_root = 'data/custom/'
classes = ('balloon',)  # names and order as in `categories` of the annotation files
train_ann, train_images = 'annotations/train.json', 'train/'
val_ann, val_images = 'annotations/val.json', 'val/'

model = dict(
    roi_head=dict(
        bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))
    )
)
data = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(
    dataset=dict(**data, ann_file=train_ann, data_prefix=dict(img=train_images))
)
val_dataloader = dict(dataset=dict(**data, ann_file=val_ann, data_prefix=dict(img=val_images)))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + val_ann)
test_evaluator = val_evaluator
