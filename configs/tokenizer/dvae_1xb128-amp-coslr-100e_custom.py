"""d-VAE on an own folder of images on one GPU."""

_base_ = './dvae_8xb64-amp-coslr-100e_in1k.py'

lr = 5e-4 * 128 / 512
_base_.train_dataloader.dataset.pipeline[0].on_error = 'skip'
train_dataloader = dict(
    batch_size=128, drop_last=False, dataset=dict(data_root='data/custom/', data_prefix='')
)
optim_wrapper = dict(optimizer=dict(lr=lr))
_base_.param_scheduler[1].eta_min = lr / 80
auto_scale_lr = dict(enable=True, base_batch_size=128)
