"""The paper's ablations: without alignment, without decoder, without regressor (BEiT's way)."""

import mmpretrain.models  # noqa: F401  registers mmpretrain's BEiT
import pytest
import torch
import torch.nn.functional as F
from builders import GRID, PATCH, VOCAB, WIDTH, build_cae, close, equal, make_batch, randomize
from mmengine.registry import MODELS, DefaultScope

from cae_mm.models import CAENeck, CAEPretrainHead
from cae_mm.models.blocks import Block
from cae_mm.models.neck import RegressorBlock
from cae_mm.patches import draw_ids, split_mask

NO_ALIGNMENT = dict(head=dict(align_weight=0.0))
NO_DECODER = dict(neck=dict(decoder_depth=0))
NO_REGRESSOR = dict(neck=dict(regressor_depth=0))
BEIT = dict(neck=dict(regressor_depth=0, decoder_depth=0), **NO_ALIGNMENT)
ALIGNMENT_ONLY = dict(head=dict(main_weight=0.0))
ABLATIONS = [
    pytest.param(changes, id=name.lower())
    for name, changes in dict(
        NO_ALIGNMENT=NO_ALIGNMENT,
        NO_DECODER=NO_DECODER,
        NEITHER=NO_ALIGNMENT | NO_DECODER,
        NO_REGRESSOR=NO_REGRESSOR,
        BEIT=BEIT,
    ).items()
]


def case(**changes):
    """A model in float64, two views, samples, indices of visible and of masked patches."""
    views, samples = make_batch()
    ids = split_mask(torch.stack([sample.mask for sample in samples]))
    model = randomize(build_cae(**changes)).double().eval()
    return model, [view.double() for view in views], samples, ids


def gradients(model, losses):
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    return {name: param.grad for name, param in model.named_parameters() if param.requires_grad}


@pytest.mark.parametrize('changes', ABLATIONS)
@pytest.mark.parametrize('bf16', [False, True])
def test_every_parameter_that_is_left_gets_a_gradient(changes, bf16):
    """No part is left over, which DistributedDataParallel would refuse."""
    model = build_cae(**changes).train()
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=bf16):
        losses = model(*make_batch(), mode='loss')
    for name, grad in gradients(model, losses).items():
        assert grad is not None and grad.isfinite().all(), name


@pytest.mark.parametrize('complementary', [False, True])
def test_without_alignment_is_the_reconstruction_loss_alone(complementary):
    options = dict(complementary_masks=complementary)
    model, views, samples, _ = case(**NO_ALIGNMENT, **options)
    losses = model(views, samples, mode='loss')
    assert set(losses) == {'loss_main', 'token_acc', 'target_codes', 'latent_std'}
    full, *_ = case(**options)
    expected = full(views, samples, mode='loss')
    equal(losses['loss_main'], expected['loss_main'])
    expected['loss_align'] = torch.zeros(())
    actual = gradients(model, losses)
    for name, grad in gradients(full, expected).items():
        close(actual[name], grad)


def test_without_alignment_its_target_is_not_computed(monkeypatch):
    model, views, samples, _ = case(**NO_ALIGNMENT)
    monkeypatch.delattr(type(model), 'align_target')
    model(views, samples, mode='loss')


def test_normalised_targets_without_alignment_are_refused():
    with pytest.raises(ValueError, match='norm_target .* align_weight=0 .* choose one'):
        build_cae(head=dict(align_weight=0, norm_target=True))


def test_a_teacher_without_alignment_is_refused():
    with pytest.raises(ValueError, match='teacher_momentum .* head.align_weight=0 .* choose one'):
        build_cae(**NO_ALIGNMENT, teacher_momentum=0.9)


def test_without_decoder_a_linear_layer_reads_the_latents():
    model, views, samples, (ids_v, ids_m) = case(**NO_DECODER)
    z_m = model.neck.regress(model.encode(views[0], ids_v), ids_v, ids_m, GRID)
    linear = model.neck.output
    mask = torch.stack([sample.mask for sample in samples])
    close(model.reconstruct(views[0], mask), z_m @ linear.weight.T + linear.bias)
    names = {name for name, _ in model.neck.named_parameters() if not name.startswith('regressor')}
    assert names == {'mask_token', 'output.weight', 'output.bias'}


def test_alignment_alone_moves_no_decoder():
    """And the encoder by the alignment only."""
    model, views, samples, _ = case(**ALIGNMENT_ONLY)
    losses = model(views, samples, mode='loss')
    assert losses['loss_main'] == 0 < losses['loss_align']
    actual = gradients(model, losses)
    full, *_ = case()
    expected = full(views, samples, mode='loss')
    full.zero_grad()
    expected['loss_align'].backward()
    for name, param in full.named_parameters():
        if param.grad is not None:
            close(actual.pop(name), param.grad)
    assert {name.split('.')[1] for name, grad in actual.items() if not grad.any()} == {
        'decoder',
        'decoder_norm',
        'output',
    }


def test_mask_tokens_stand_for_patches_in_the_encoder():
    """By hand: all patches in their order, masked ones replaced before positions are added."""
    model, views, samples, (ids_v, ids_m) = case(**NO_REGRESSOR)
    encoder, mask = model.backbone, torch.stack([sample.mask for sample in samples])
    x = encoder._embed(views[0], GRID)  # [B, 1+N, D]
    positions = encoder.positions(GRID, torch.device('cpu')).double()
    x[:, 1:] = torch.where(mask[..., None], model.neck.mask_token + positions, x[:, 1:])
    for block in encoder.blocks:
        x = block(x, GRID)
    x = encoder.norm(x)[:, 1:]
    z_m = x[mask].unflatten(0, ids_m.shape)  # ascending, as ids_m
    close(model.reconstruct(views[0], mask), model.neck.decode(z_m, ids_m, GRID))
    losses = model(views, samples, mode='loss')
    target = encoder.forward_features(views[0], ids_m)[:, 1:]  # sees the masked patches alone
    close(losses['loss_align'], 2 * F.mse_loss(z_m, target))


def test_pixels_behind_mask_tokens_do_not_matter():
    model, views, samples, _ = case(**BEIT)
    mask = torch.stack([sample.mask for sample in samples])
    before = model.reconstruct(views[0], mask)
    hidden = mask.view(3, 1, *GRID).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    assert torch.equal(model.reconstruct(views[0].masked_fill(hidden, 1e4), mask), before)


def test_encoder_of_beit_is_a_plain_encoder():
    """Its weights have no mask token: they load wherever CAE's do."""
    beit, cae = build_cae(**BEIT), build_cae()
    cae.backbone.load_state_dict(beit.backbone.state_dict(), strict=True)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            dict(neck=dict(regressor_depth=0, embed_dims=24, num_heads=3)),
            'regressor_depth=0 puts mask tokens .* embed_dims is 24, but must be 16, as in_dims',
        ),
        (
            NO_REGRESSOR | dict(complementary_masks=True),
            'complementary_masks .* neck.regressor_depth=0: choose one',
        ),
    ],
)
def test_what_needs_a_regressor_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build_cae(**changes)


class Logits(torch.nn.Module):
    """What mmpretrain's BEiT wants of a tokenizer: a map of logits of the second view."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images):
        return F.one_hot(self.tokenizer.tokenize(images), VOCAB).movedim(-1, 1)


@DefaultScope.overwrite_default_scope('mmpretrain')
def build_mmpretrains_beit(tokenizer):
    return MODELS.build(
        dict(
            type='mmpretrain.BEiT',
            backbone=dict(
                type='mmpretrain.BEiTPretrainViT',
                arch=dict(
                    embed_dims=WIDTH, num_layers=2, num_heads=2, feedforward_channels=4 * WIDTH
                ),
                img_size=GRID[0] * PATCH,
                patch_size=PATCH,
                use_abs_pos_emb=True,
                use_shared_rel_pos_bias=False,
            ),
            head=dict(
                type='mmpretrain.BEiTV1Head',
                embed_dims=WIDTH,
                num_embed=VOCAB,
                loss=dict(type='mmpretrain.CrossEntropyLoss'),
            ),
            target_generator=Logits(tokenizer),
        )
    )


RENAMES = [  # from mmpretrain's names to ours, in this order
    ('backbone.mask_token', 'neck.mask_token'),
    ('backbone.patch_embed.projection', 'backbone.patch_embed.proj'),
    ('backbone.layers.', 'backbone.blocks.'),
    ('backbone.ln1.', 'backbone.norm.'),
    ('backbone.norm1.', 'backbone.norm.'),
    ('head.cls_head.', 'neck.output.'),
    ('.ln1.', '.norm1.'),
    ('.ln2.', '.norm2.'),
    ('.gamma1', '.gamma_1'),
    ('.gamma2', '.gamma_2'),
    ('.ffn.layers.0.0.', '.mlp.fc1.'),
    ('.ffn.layers.1.', '.mlp.fc2.'),
]


def our_name(name):
    for old, new in RENAMES:
        name = name.replace(old, new)
    return name


def test_is_mmpretrains_beit():
    """Loss and all gradients, where its learned positions are our fixed ones."""
    ours, views, samples, _ = case(**BEIT)
    theirs = build_mmpretrains_beit(ours.target_generator).double()
    table = ours.backbone.positions(GRID, torch.device('cpu')).double()
    positions = F.pad(table, (0, 0, 1, 0))[None]  # the class token has none
    state = {name: ours.state_dict().get(our_name(name)) for name in theirs.state_dict()}
    skip = ('target_generator.', 'data_preprocessor.')
    state = {name: value for name, value in state.items() if not name.startswith(skip)}
    theirs.load_state_dict(state | {'backbone.pos_embed': positions}, strict=False)
    [loss] = theirs(views, samples, mode='loss').values()
    losses = ours(views, samples, mode='loss')
    close(losses['loss_main'], loss)
    loss.backward()
    expected = {our_name(name): p.grad for name, p in theirs.named_parameters()}
    expected = {k: v for k, v in expected.items() if 'pos_embed' not in k and 'target' not in k}
    actual = gradients(ours, losses)
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        close(grad, expected[name])


@pytest.mark.parametrize('block', [Block, RegressorBlock])
def test_no_layer_scale_is_a_scale_of_1_that_is_not_learned(block):
    """The names are the same, so that files of one kind load into the other."""
    torch.manual_seed(0)
    none, one = block(16, 2, layer_scale=None), block(16, 2, layer_scale=1.0)
    one.load_state_dict(none.state_dict(), strict=True)
    x = torch.randn(2, 5, 16)
    args = (x,) if block is Block else (x, x, x, torch.cat([x, x], dim=1))
    equal(none(*args), one(*args))
    none(*args).sum().backward(), one(*args).sum().backward()
    for (name, ours), theirs in zip(none.named_parameters(), one.parameters(), strict=True):
        assert ours.requires_grad != name.startswith('gamma_')
        assert (ours.grad is not None) == ours.requires_grad
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_layer_scale_of_encoder_and_neck_are_apart():
    arch = dict(embed_dims=WIDTH, depth=1, num_heads=2, layer_scale=None)
    encoder = build_cae(backbone=dict(arch=arch))
    neck = build_cae(neck=dict(layer_scale=None))
    for model, frozen in ((encoder, 'backbone'), (neck, 'neck')):
        gammas = {name: p for name, p in model.named_parameters() if '.gamma_' in name}
        for name, gamma in gammas.items():
            assert gamma.requires_grad != name.startswith(frozen)
            assert gamma.unique().item() == pytest.approx(0.1 if gamma.requires_grad else 1.0)


def test_normalised_alignment_target():
    torch.manual_seed(0)
    z, target = torch.randn(2, 3, 16), 3 + 2 * torch.randn(2, 3, 16)
    y, tokens = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    losses = CAEPretrainHead(norm_target=True).loss(y, tokens, z, target)
    mean, var = target.mean(-1, keepdim=True), target.var(-1, correction=0, keepdim=True)
    expected = (target - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(losses['loss_align'], 2 * F.mse_loss(z, expected))
    cosine = F.cosine_similarity(z, expected, dim=-1).mean()
    torch.testing.assert_close(losses['align_cos'], cosine)


def test_depth_0_has_no_norms_that_nothing_reads():
    names = {name for name, _ in CAENeck(regressor_depth=0, decoder_depth=0).named_parameters()}
    assert names == {'mask_token', 'output.weight', 'output.bias'}


def test_a_share_of_the_masked_patches_is_all_that_is_predicted_and_seen():
    model, views, samples, (ids_v, ids_m) = case(predicted_share=0.5)
    torch.manual_seed(1)
    drawn = draw_ids(ids_m, 0.5)
    with torch.no_grad():
        expected = model._losses(views, ids_v, drawn, GRID)
        seen = torch.zeros(len(drawn), GRID[0] * GRID[1], dtype=torch.bool)
        seen = seen.scatter(1, ids_v, True).scatter(1, drawn, True).view(-1, 1, *GRID)
        hidden = ~F.interpolate(seen.double(), views[0].shape[-2:]).bool()
        spoiled = [views[0].masked_fill(hidden, torch.nan), views[1]]
        for images in (views, spoiled):  # the patches that were not drawn have no say
            torch.manual_seed(1)
            losses = model(images, samples, mode='loss')
            assert all(torch.equal(losses[name], value) for name, value in expected.items())


def test_predicting_all_draws_no_random_number():
    model, views, samples, _ = case()
    state = torch.get_rng_state()
    model(views, samples, mode='loss')
    equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('share', [0, -0.5, 1.5])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(ValueError, match=r'predicted_share must be in \(0, 1\]'):
        build_cae(predicted_share=share)
