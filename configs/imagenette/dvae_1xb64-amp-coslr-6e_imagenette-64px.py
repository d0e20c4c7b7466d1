"""d-VAE of 512 tokens for the comparison on Imagenette (docs/comparison.md), 64 px."""

_base_ = '../tokenizer/dvae_1xb128-amp-coslr-100e_custom.py'

model = dict(vocab_size=512, codebook_dims=64, hidden_dims=64, num_res_blocks=1)
_base_.train_dataloader.dataset.pipeline[2].update(scale=64, crop_ratio_range=(0.3, 1.0))
train_dataloader = dict(
    batch_size=64,
    num_workers=2,
    dataset=dict(data_root='data/imagenette128/', data_prefix='train'),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
_base_.param_scheduler[1].eta_min = 1e-5
train_cfg = dict(max_epochs=6)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1))
auto_scale_lr = dict(enable=True, base_batch_size=64)
