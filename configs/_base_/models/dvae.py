"""d-VAE with the vocabulary of DALL-E's; 8 pixels of a side per token."""

model = dict(
    type='cae_mm.DiscreteVAE',
    data_preprocessor=dict(
        type='mmpretrain.SelfSupDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True
    ),
    vocab_size=8192,
    codebook_dims=512,
    hidden_dims=256,
    num_res_blocks=2,
    usage_weight=0.01,
)
