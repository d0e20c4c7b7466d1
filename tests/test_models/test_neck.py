import math

import official_reference as official
import pytest
import torch
from builders import GRID, VOCAB, WIDTH, build_cae, close, randomize

from cae_mm.models import CAENeck
from cae_mm.models.neck import RegressorBlock

OFFICIAL_NAMES = [
    ('norm_', 'norm1_'),
    ('norm2', 'norm2_cross'),
    ('.q.bias', '.q_bias'),
    ('.v.bias', '.v_bias'),
    ('attn.', 'cross_attn.'),
    ('mlp.', 'mlp_cross.'),
    ('gamma_1', 'gamma_1_cross'),
    ('gamma_2', 'gamma_2_cross'),
]


def test_regressor_block_is_the_official_one():
    block = randomize(RegressorBlock(8, 2).double())
    state = {}
    for name, value in block.state_dict().items():
        for ours, theirs in OFFICIAL_NAMES:
            name = name.replace(ours, theirs)
        state[name] = value
    x_m, z_v, pos_m, pos = (torch.randn(2, n, 8, dtype=torch.float64) for n in (3, 4, 3, 7))
    expected = official.regressor_block(x_m, z_v, pos_m, pos, state, '', heads=2)
    close(block(x_m, z_v, pos_m, pos), expected)


def neck_and_latents():
    neck = build_cae().neck.eval()
    torch.manual_seed(1)
    ids = torch.stack([torch.randperm(16) for _ in range(2)])
    return neck, torch.randn(2, 9, WIDTH), ids[:, :9], ids[:, 9:]


def test_mask_token_is_the_query_of_each_masked_patch():
    """With a sentinel in its place and a block scaled by 0, M normalised sentinels come out."""
    neck = CAENeck(in_dims=16, embed_dims=16, num_heads=2, regressor_depth=1, layer_scale=0.0)
    with torch.no_grad():
        neck.mask_token.copy_(torch.arange(16.0))
    _, z_v, ids_v, ids_m = neck_and_latents()
    z_m = neck.regress(z_v, ids_v, ids_m, GRID)
    want = torch.nn.functional.layer_norm(torch.arange(16.0), (16,), eps=1e-6)
    torch.testing.assert_close(z_m, want.expand(2, 7, 16))


def test_order_of_visible_patches_does_not_matter():
    neck, z_v, ids_v, ids_m = neck_and_latents()
    order = torch.randperm(9)
    torch.testing.assert_close(
        neck.regress(z_v[:, order], ids_v[:, order], ids_m, GRID),
        neck.regress(z_v, ids_v, ids_m, GRID),
        rtol=1e-4,
        atol=1e-5,
    )


def test_masked_patches_differ_by_their_position_only():
    neck, z_v, ids_v, ids_m = neck_and_latents()
    order = torch.randperm(7)
    shuffled = neck.regress(z_v, ids_v, ids_m[:, order], GRID)
    torch.testing.assert_close(
        shuffled, neck.regress(z_v, ids_v, ids_m, GRID)[:, order], rtol=1e-4, atol=1e-5
    )
    assert (shuffled[:, 0] - shuffled[:, 1]).abs().max() > 1e-3


def test_drop_path_is_linear_in_either_part():
    neck = CAENeck(in_dims=16, embed_dims=16, num_heads=2, drop_path_rate=0.3)
    for part in (neck.regressor, neck.decoder):
        rates = [block.drop_path.drop_prob for block in part]
        assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_drop_path_drops_whole_branches():
    block = RegressorBlock(8, 2, drop_path=0.999999, layer_scale=1.0).train()
    x_m, z_v, pos_m, pos = (torch.randn(4, n, 8) for n in (3, 5, 3, 8))
    torch.testing.assert_close(block(x_m, z_v, pos_m, pos), block.norm2(x_m))


def test_recipe_of_the_paper_by_default():
    neck = CAENeck()
    assert len(neck.regressor) == len(neck.decoder) == 4
    assert neck.output.out_features == 8192
    assert neck.decoder[0].gamma_1.unique().item() == pytest.approx(0.1)
    assert isinstance(neck.projection, torch.nn.Identity)


def test_initialisation_is_the_official_one():
    neck = build_cae().neck
    assert neck.mask_token.abs().max() <= 0.02
    assert neck.mask_token.std() > 0
    bound = math.sqrt(6 / (WIDTH + VOCAB))  # xavier uniform
    assert bound * 0.9 < neck.output.weight.abs().max() <= bound
    assert not neck.output.bias.any()
