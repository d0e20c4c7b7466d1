"""d-VAE of 512 tokens for the comparison on Imagenette (docs/comparison.md), 64 px."""

_base_ = '../tokenizer/dvae_8xb64-amp-coslr-100e_in1k.py'

from cae_mm.engine.settings import apply_settings

apply_settings(
    _base_,
    img_size=64,
    data_root='data/imagenette128/',
    cpu_batch_size=None,
    transforms=dict(RandomResizedCrop=dict(crop_ratio_range=(0.3, 1.0))),
)
model = dict(vocab_size=512, codebook_dims=64, hidden_dims=64, num_res_blocks=1)
train_dataloader = dict(drop_last=False)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
_base_.param_scheduler[1].eta_min = 1e-5
train_cfg = dict(max_epochs=6)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1))
auto_scale_lr = dict(base_batch_size=64)
