import copy

import pytest
import torch
import torch.nn.functional as F
from builders import GRID, VOCAB, build_cae, make_batch
from mmengine.runner.checkpoint import get_state_dict, load_state_dict
from mmpretrain.structures import DataSample

from cae_mm.patches import split_mask


def total(losses):
    return losses['loss_main'] + losses['loss_align']


def case(**changes):
    """A model in eval mode, two views, samples and their masks."""
    views, samples = make_batch()
    return build_cae(**changes).eval(), views, samples, torch.stack([s.mask for s in samples])


def test_loss_is_the_formula_of_the_paper():
    """Section by section: encode, regress, align, decode, tokenize, CE + 2 MSE."""
    model, views, samples, mask = case()
    losses = model(views, samples, mode='loss')

    ids_m = torch.stack([row.nonzero().flatten() for row in mask])
    ids_v = torch.stack([(~row).nonzero().flatten() for row in mask])
    encoder, neck = model.backbone, model.neck
    z_v = encoder.forward_features(views[0], ids_v)[:, 1:]
    z_m = neck.regress(z_v, ids_v, ids_m, GRID)
    z_target = encoder.forward_features(views[0], ids_m)[:, 1:]
    logits = neck.decode(z_m, ids_m, GRID)
    tokens = model.target_generator.tokenize(views[1]).flatten(1)
    cross_entropy = torch.stack(
        [
            -logits[b, i].log_softmax(-1)[tokens[b, ids_m[b, i]]]
            for b in range(3)
            for i in range(ids_m.shape[1])
        ]
    ).mean()
    torch.testing.assert_close(losses['loss_main'], cross_entropy)
    torch.testing.assert_close(losses['loss_align'], 2 * ((z_m - z_target) ** 2).mean())


@pytest.mark.parametrize('bf16', [False, True])
def test_every_trainable_parameter_and_no_other_gets_a_gradient(bf16):
    """Under autocast too, whose cache may hold weights cast in the target branch."""
    model = build_cae().train()
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=bf16):
        losses = model(*make_batch(), mode='loss')
    total(losses).backward()
    for name, param in model.named_parameters():
        assert param.requires_grad != name.startswith('target_generator.')
        assert (param.grad is not None) == param.requires_grad, name


def test_no_gradient_flows_through_the_alignment_target():
    """The gradient is that of a constant target."""
    model, views, samples, mask = case()
    model(views, samples, mode='loss')['loss_align'].backward()
    got = {k: p.grad.clone() for k, p in model.backbone.named_parameters() if p.grad is not None}

    model.zero_grad()
    ids_v, ids_m = split_mask(mask)
    constant = model.align_target(views[0], ids_m).detach().clone()
    z_m = model.neck.regress(model.encode(views[0], ids_v), ids_v, ids_m, GRID)
    (2 * F.mse_loss(z_m, constant)).backward()
    for name, param in model.backbone.named_parameters():
        torch.testing.assert_close(param.grad, got[name])


def test_targets_are_computed_outside_autograd(monkeypatch):
    """Not only detached: a graph of the target branch would hold its activations."""
    model, received = build_cae().train(), []
    monkeypatch.setattr(model.head, 'loss', lambda *args, **kwargs: received.extend(args) or {})
    model(*make_batch(), mode='loss')
    y_m, y_target, z_m, z_target = received
    assert y_m.requires_grad and z_m.requires_grad
    assert not y_target.requires_grad and not z_target.requires_grad


def test_masked_pixels_do_not_reach_the_prediction():
    """Neither visible latents nor predictions change by a bit with what is masked."""
    model, views, _, mask = case()
    before = model.reconstruct(views[0], mask)
    hidden = mask.view(3, 1, *GRID).repeat_interleave(4, 2).repeat_interleave(4, 3)
    changed = torch.where(hidden, torch.full_like(views[0], 1e4), views[0])
    assert torch.equal(model.reconstruct(changed, mask), before)


def test_decoder_never_sees_visible_latents():
    """Logits stay when visible latents are replaced after the regressor."""
    model, views, _, mask = case()
    seen = []

    def regress(z_v, ids_v, ids_m, grid):
        z_m = type(model.neck).regress(model.neck, z_v, ids_v, ids_m, grid)
        seen.append(z_v)
        with torch.no_grad():
            z_v.fill_(1e4)  # sentinel
        return z_m

    before = model.reconstruct(views[0], mask)
    model.neck.regress = regress
    assert torch.equal(model.reconstruct(views[0], mask), before)
    assert (seen[0] == 1e4).all()


def test_drop_path_stays_active_in_the_target_branch_as_in_the_official_code():
    model, views, _, mask = case(backbone=dict(drop_path_rate=0.5))
    model.train()
    _, ids = split_mask(mask)
    torch.manual_seed(0)
    targets = [model.align_target(views[0], ids) for _ in range(8)]
    assert any(not torch.equal(targets[0], other) for other in targets)


@pytest.mark.parametrize('grid', [(4, 4), (2, 6), (5, 3)])
@pytest.mark.parametrize('masked', [1, 3, 8])
def test_any_grid_and_mask_ratio(grid, masked):
    model = build_cae(backbone=dict(img_size=(grid[0] * 4, grid[1] * 4)))
    losses = model(*make_batch(grid=grid, masked=masked), mode='loss')
    assert torch.isfinite(total(losses))


def test_mask_may_be_a_grid():
    model, views, samples, _ = case()
    flat = model(views, samples, mode='loss')
    grids = [DataSample(mask=sample.mask.view(GRID)) for sample in samples]
    assert torch.equal(model(views, grids, mode='loss')['loss_main'], flat['loss_main'])


def test_decoder_width_may_differ():
    """Encoder and target pass the same projection; the target gives it no gradient."""
    model, views, samples, mask = case(neck=dict(embed_dims=24, num_heads=3))
    _, ids = split_mask(mask)
    latents = model.backbone.forward_features(views[0], ids)[:, 1:]
    linear, norm = model.neck.projection
    torch.testing.assert_close(model.align_target(views[0], ids), norm(linear(latents)))
    total(model(views, samples, mode='loss')).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_tokenizer_stays_out_of_training_and_of_checkpoints():
    model = build_cae().train()
    assert not model.target_generator.training
    for state in (model.state_dict(), get_state_dict(model)):  # torch's and mmengine's
        assert not any('target_generator' in key for key in state)
        assert any(key.startswith('backbone.') for key in state)
    other = build_cae()
    other.load_state_dict(model.state_dict(), strict=True)
    missing = {k: v for k, v in model.state_dict().items() if k != 'neck.mask_token'}
    with pytest.raises(RuntimeError, match=r'neck\.mask_token'):
        other.load_state_dict(missing, strict=True)


def test_no_second_encoder():
    names = {name.split('.')[0] for name, _ in build_cae().named_parameters()}
    assert names == {'backbone', 'neck', 'target_generator'}


def test_ema_teacher():
    model = build_cae(teacher_momentum=0.9).train()
    start = copy.deepcopy(model.backbone.state_dict())
    assert all(torch.equal(v, start[k]) for k, v in model.teacher.state_dict().items())
    with torch.no_grad():
        for param in model.backbone.parameters():
            param.add_(1.0)
    views, samples = make_batch()
    total(model(views, samples, mode='loss')).backward()
    for name, param in model.teacher.named_parameters():
        assert not param.requires_grad
        torch.testing.assert_close(param, start[name] + 0.1)
    before = copy.deepcopy(model.teacher.state_dict())
    model.eval()(views, samples, mode='loss')
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.state_dict().items())
    assert 'teacher.cls_token' in model.state_dict()  # needed to resume


@pytest.mark.parametrize('load', [torch.nn.Module.load_state_dict, load_state_dict])
def test_a_teacher_follows_weights_that_have_none(load):
    """They are of a training without one, read by torch or by the Runner (mmengine's function)."""
    weights = {k: v + 1 for k, v in build_cae().state_dict().items()}
    model = build_cae(teacher_momentum=0.9)
    load(model, weights, strict=False)
    teacher = model.teacher.state_dict()
    assert all(torch.equal(v, weights[f'backbone.{k}']) for k, v in teacher.items())
    own = {k: v + k.startswith('teacher.') for k, v in model.state_dict().items()}
    load(model, own, strict=True)  # one that has a teacher keeps it
    assert all(torch.equal(v, own[f'teacher.{k}']) for k, v in model.teacher.state_dict().items())


def test_teacher_momentum_is_checked():
    with pytest.raises(ValueError, match=r'teacher_momentum must be in \[0, 1\), not 1.5'):
        build_cae(teacher_momentum=1.5)


def test_rgb_targets_need_one_view():
    model = build_cae(neck=dict(out_dims=48), target_generator=dict(type='cae_mm.RGBTarget'))
    views, samples = make_batch()
    losses = model(views[:1], samples, mode='loss')
    assert set(losses) == {'loss_main', 'loss_align', 'align_cos', 'latent_std'}
    with pytest.raises(ValueError, match='DiscreteVAE reads view 2, but inputs has 1 view'):
        build_cae()(views[:1], samples, mode='loss')


def test_parse_losses_adds_the_two_losses_only():
    model = build_cae()
    loss, log = model.parse_losses(model(*make_batch(), mode='loss'))
    torch.testing.assert_close(loss, log['loss_main'] + log['loss_align'])
    assert {'token_acc', 'align_cos', 'latent_std', 'target_codes'} < set(log)


def test_bf16_keeps_losses_in_float32():
    model = build_cae()
    full = model(*make_batch(), mode='loss')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        half = model(*make_batch(), mode='loss')
    for name in ('loss_main', 'loss_align'):
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], full[name], rtol=0.03, atol=0)


def test_extract_feat_takes_one_or_two_views():
    model = build_cae()
    views, _ = make_batch()
    assert torch.equal(model(views)[0], model.backbone(views[0])[0])
    assert torch.equal(model(views[0], mode='tensor')[0], model.backbone(views[0])[0])


@pytest.mark.parametrize(
    ('grid', 'mask_size', 'message'),
    [
        ((4, 6), 24, 'the images are 16x24 pixels, but backbone.img_size is 16x16'),
        ((4, 4), 9, 'the masks have 9 entries, but the images have 4x4 patches'),
    ],
)
def test_mismatches_are_named(grid, mask_size, message):
    views, _ = make_batch(grid=grid)
    samples = [DataSample(mask=torch.arange(mask_size) < 2) for _ in range(3)]
    with pytest.raises(ValueError, match=message):
        build_cae()(views, samples, mode='loss')


def test_collapse_shows_in_latent_std():
    """Latents that depend on the position alone score 0, whatever the masks."""
    model, views, samples, _ = case()
    healthy = model(views, samples, mode='loss')['latent_std']
    model.neck.regress = lambda z_v, ids_v, ids_m, grid: model.neck._positions(grid, ids_m)
    assert model(views, samples, mode='loss')['latent_std'] < 1e-6 < healthy


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('target', ['cae_mm.DiscreteVAE', 'cae_mm.DALLEEncoder'])
def test_a_step_on_a_gpu_never_waits_for_it(target):
    dalle = dict(type=target, n_hid=8, vocab_size=VOCAB)
    model = build_cae(**(dict(target_generator=dalle) if 'DALLE' in target else {})).cuda().train()
    views, samples = make_batch()
    views = [view.cuda() for view in views]
    total(model(views, samples, mode='loss')).backward()  # warm-up
    torch.cuda.set_sync_debug_mode('error')
    try:
        with torch.autocast('cuda', dtype=torch.bfloat16):
            losses = model(views, samples, mode='loss')
        total(losses).backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert torch.isfinite(total(losses))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(in_dims=24), 'neck.in_dims is 24, but must be 16, the width of the backbone'),
        (dict(out_dims=31), 'neck.out_dims is 31, but must be 32, what DiscreteVAE wants'),
    ],
)
def test_widths_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build_cae(neck=changes)


def test_images_with_other_channels_are_refused():
    with pytest.raises(ValueError, match='backbone.in_channels is 4, but views, .* have 3'):
        build_cae(backbone=dict(in_channels=4))
