"""CAE-B, 300 epochs, tokens of an own d-VAE (train it with configs/tokenizer first)."""

_base_ = './cae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'

model = dict(
    data_preprocessor=dict(second_mean=[127.5] * 3, second_std=[127.5] * 3),
    target_generator=dict(
        _delete_=True,
        type='cae_mm.DiscreteVAE',
        vocab_size=8192,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/dvae_8xb64-amp-coslr-100e_in1k/epoch_100.pth',
        ),
    ),
)
