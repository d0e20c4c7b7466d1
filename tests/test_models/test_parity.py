"""Ours against mmpretrain's CAE: same weights, masks and tokens give the same numbers."""

import mmpretrain.models  # noqa: F401  registers mmpretrain's CAE
import pytest
import torch
from builders import cae_config, equal
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample

WIDTH, HEADS, DEPTH, VOCAB, GRID = 32, 4, 3, 512, 4
MASKED = 7


@DefaultScope.overwrite_default_scope('mmpretrain')
def build_theirs() -> torch.nn.Module:
    model = MODELS.build(
        dict(
            type='mmpretrain.CAE',
            backbone=dict(
                type='mmpretrain.CAEPretrainViT',
                arch=dict(
                    embed_dims=WIDTH,
                    num_layers=DEPTH,
                    num_heads=HEADS,
                    feedforward_channels=4 * WIDTH,
                ),
                img_size=16 * GRID,
                layer_scale_init_value=0.1,
            ),
            neck=dict(
                type='mmpretrain.CAENeck',
                num_classes=VOCAB,
                embed_dims=WIDTH,
                num_heads=HEADS,
                regressor_depth=2,
                decoder_depth=2,
                layer_scale_init_value=0.1,
                mask_tokens_num=MASKED,
            ),
            head=dict(type='mmpretrain.CAEHead', loss=dict(type='mmpretrain.CAELoss', lambd=2)),
            # float32 only, by its own check: the tokens are the same all the same
            target_generator=dict(type='mmpretrain.DALL-E', n_hid=64, vocab_size=VOCAB),
        )
    )
    model.init_weights()
    return model


def build_ours() -> torch.nn.Module:
    return MODELS.build(
        cae_config(
            backbone=dict(
                arch=dict(embed_dims=WIDTH, depth=DEPTH, num_heads=HEADS, layer_scale=0.1),
                img_size=16 * GRID,
                patch_size=16,
            ),
            neck=dict(
                in_dims=WIDTH, embed_dims=WIDTH, num_heads=HEADS, decoder_depth=2, out_dims=VOCAB
            ),
            target_generator=dict(type='cae_mm.DALLEEncoder', n_hid=64, vocab_size=VOCAB),
        )
    )


RENAMES = [  # from mmpretrain's names to ours, in this order
    ('backbone.patch_embed.projection', 'backbone.patch_embed.proj'),
    ('backbone.layers.', 'backbone.blocks.'),
    ('backbone.norm1.', 'backbone.norm.'),
    ('backbone.ln1.', 'backbone.norm.'),
    ('neck.regressors.', 'neck.regressor.'),
    ('neck.decoders.', 'neck.decoder.'),
    ('neck.norm_regressor.', 'neck.regressor_norm.'),
    ('neck.norm_decoder.', 'neck.decoder_norm.'),
    ('neck.head.', 'neck.output.'),
    ('.norm1_q_cross.', '.norm_q.'),
    ('.norm1_k_cross.', '.norm_k.'),
    ('.norm1_v_cross.', '.norm_v.'),
    ('.norm2_cross.', '.norm2.'),
    ('.cross_attn.q_bias', '.attn.q.bias'),
    ('.cross_attn.v_bias', '.attn.v.bias'),
    ('.cross_attn.', '.attn.'),
    ('.gamma_1_cross', '.gamma_1'),
    ('.gamma_2_cross', '.gamma_2'),
    ('.ln1.', '.norm1.'),
    ('.ln2.', '.norm2.'),
    ('.ffn.layers.0.0.', '.mlp.fc1.'),
    ('.ffn.layers.1.', '.mlp.fc2.'),
]


def our_name(name: str) -> str:
    for old, new in RENAMES:
        name = name.replace(old, new)
    return name


@pytest.fixture(scope='module')
def pair():
    torch.manual_seed(0)
    theirs, ours = build_theirs(), build_ours()
    for name, param in theirs.named_parameters():
        if 'teacher' not in name and 'target_generator' not in name:
            # also what starts at 0 or 1 must be told apart
            with torch.no_grad():
                param.add_(torch.randn_like(param) * 0.2) if param.ndim < 2 else None
    theirs.teacher.load_state_dict(theirs.backbone.state_dict())
    skip = ('teacher.', 'data_preprocessor.', 'backbone.pos_embed')
    state = {our_name(k): v for k, v in theirs.state_dict().items() if not k.startswith(skip)}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    for model in (theirs, ours):
        model.backbone.double(), model.neck.double()
    theirs.teacher.double()

    images = torch.randn(3, 3, 16 * GRID, 16 * GRID, dtype=torch.float64)
    second = torch.rand(3, 3, 8 * GRID, 8 * GRID) * 0.8 + 0.1
    masks = torch.rand(3, GRID**2).argsort(1) < MASKED
    samples = [DataSample(mask=mask) for mask in masks]
    results = []
    for model in (theirs.train(), ours.train()):
        losses = model([images, second], samples, mode='loss')
        loss, _ = model.parse_losses(losses)
        loss.backward()
        results.append(losses)
    return theirs, ours, *results


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal to 1e-8 of the largest value; norm_k.bias has gradient 0 up to rounding (1e-17)."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-8 * b.abs().max().item() + 1e-15)


def test_losses_are_mmpretrains(pair):
    _, _, theirs, ours = pair
    close(ours['loss_main'], theirs['main'])
    close(ours['loss_align'], theirs['align'])


def test_gradients_are_mmpretrains(pair):
    theirs, ours, _, _ = pair
    grads = {our_name(k): p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    ours = {k: p for k, p in ours.named_parameters() if p.requires_grad}
    assert grads.keys() == ours.keys()
    for name, param in ours.items():
        close(param.grad, grads[name])


def test_positions_are_mmpretrains(pair):
    theirs, ours, _, _ = pair
    table = ours.backbone.positions((GRID, GRID), torch.device('cpu'))
    equal(table, theirs.backbone.pos_embed[0, 1:].float())
