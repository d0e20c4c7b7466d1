"""d-VAE on your own images: see the pretraining of this name."""

_base_ = './dvae_8xb64-amp-coslr-100e_in1k.py'

from cae_mm.engine.settings import apply_settings

lr = 5e-4 * 128 / 512
apply_settings(_base_, batch_size=128)
train_dataloader = dict(drop_last=False, dataset=dict(data_root='data/custom/', data_prefix=''))
optim_wrapper = dict(optimizer=dict(lr=lr))
_base_.param_scheduler[1].eta_min = lr / 80
auto_scale_lr = dict(base_batch_size=128)
