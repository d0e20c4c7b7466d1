"""d-VAE for `make demo`: 256 tokens, learned from grayscale crops in about a minute."""

_base_ = '../tokenizer/dvae_8xb64-amp-coslr-100e_in1k.py'

from cae_mm.engine.settings import apply_settings

apply_settings(
    _base_,
    img_size=64,
    batch_size=32,
    data_root='work_dirs/demo/crops/',
    cpu_batch_size=None,
    transforms=dict(RandomResizedCrop=dict(crop_ratio_range=(0.3, 1.0))),
)
model = dict(vocab_size=256, codebook_dims=64, hidden_dims=64, num_res_blocks=1)
train_dataloader = dict(num_workers=0, drop_last=False)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, convert_to_iter_based=True)
]
train_cfg = dict(max_epochs=8)
auto_scale_lr = dict(base_batch_size=32)
