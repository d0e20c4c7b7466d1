import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS

from cae_mm.models import DALLEDecoder, DALLEEncoder, DiscreteVAE, RGBTarget
from cae_mm.models.targets.dalle import Conv2d

GRID = (2, 3)
IDS = torch.tensor([[0, 4], [5, 1]])


def tokenizers():
    torch.manual_seed(0)
    dalle = DALLEEncoder(n_hid=16, vocab_size=64)
    with torch.no_grad():  # random weights give one token to all images: take its lead away
        features = dalle.encode_features(30 * torch.randn(4, 3, 16, 24)).movedim(1, -1)
        dalle.blocks.output.conv.b.sub_(dalle.classify(features).mean((0, 1, 2)))
    dvae = DiscreteVAE(vocab_size=64, codebook_dims=8, hidden_dims=8, num_res_blocks=1)
    return [dalle.eval(), dvae.eval()]


@pytest.mark.parametrize('tokenizer', tokenizers(), ids=lambda t: type(t).__name__)
class TestTokenizers:
    def test_masked_tokens_are_those_of_the_whole_image(self, tokenizer):
        images = 30 * torch.randn(2, 3, 16, 24)
        tokens = tokenizer.tokenize(images)
        assert tokens.shape == (2, *GRID) and tokens.unique().numel() > 1
        assert torch.equal(tokenizer.targets(images, IDS, GRID), tokens.flatten(1).gather(1, IDS))

    def test_output_layer_runs_on_masked_patches_only(self, tokenizer, monkeypatch):
        seen = []
        classify = type(tokenizer).classify
        monkeypatch.setattr(
            type(tokenizer), 'classify', lambda self, x: seen.append(x.shape) or classify(self, x)
        )
        tokenizer.targets(torch.rand(2, 3, 16, 24), IDS, GRID)
        assert seen[0][:2] == IDS.shape

    def test_no_gradient(self, tokenizer):
        images = torch.rand(2, 3, 16, 24, requires_grad=True)
        assert not tokenizer.targets(images, IDS, GRID).requires_grad
        assert not tokenizer.tokenize(images).requires_grad

    def test_wrong_size_of_the_second_view_is_named(self, tokenizer):
        with pytest.raises(ValueError, match=r'2x3 patches, .* 24x24 .* second_size=\(16, 24\)'):
            tokenizer.targets(torch.rand(2, 3, 24, 24), IDS, GRID)

    def test_missing_weights_name_the_path_and_three_ways_out(self, tokenizer, tmp_path):
        path = tmp_path / 'none.safetensors'
        tokenizer = MODELS.build(
            dict(
                type=f'cae_mm.{type(tokenizer).__name__}',
                init_cfg=dict(type='Pretrained', checkpoint=str(path)),
            )
        )
        with pytest.raises(FileNotFoundError) as error:
            tokenizer.init_weights()
        for text in (str(path), 'convert_dalle.py', 'configs/tokenizer', 'cae-rgb'):
            assert text in str(error.value)


def naive_dalle(encoder: DALLEEncoder, x: torch.Tensor) -> torch.Tensor:
    """The published structure, written as one loop over its state dict; logits everywhere."""
    state = encoder.state_dict()

    def conv(name, x):
        w = state[f'blocks.{name}.w']
        return F.conv2d(x, w, state[f'blocks.{name}.b'], padding=w.shape[-1] // 2)

    x = conv('input', x)
    for g in range(1, 5):
        for b in (1, 2):
            name = f'group_{g}.block_{b}'
            skip = conv(f'{name}.id_path', x) if f'blocks.{name}.id_path.w' in state else x
            for i in range(1, 5):
                x = conv(f'{name}.res_path.conv_{i}', x.relu())
            x = skip + x / 64  # 1 / (4 groups x 2 blocks) ** 2
        if g < 4:
            x = F.max_pool2d(x, 2)
    return conv('output.conv', x.relu())


def test_dalle_encoder_has_the_published_structure():
    encoder = DALLEEncoder(n_hid=16, vocab_size=64).double()
    x = torch.rand(2, 3, 32, 16, dtype=torch.float64)
    got = encoder.classify(encoder.encode_features(x).movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(got, naive_dalle(encoder, x))


def test_dalle_weights_start_with_the_published_deviation():
    torch.manual_seed(0)
    weight = Conv2d(64, 32, 3).w
    assert weight.std().item() == pytest.approx((64 * 3 * 3) ** -0.5, rel=0.02)


def test_published_sizes_by_default():
    with torch.device('meta'):
        encoder, decoder = DALLEEncoder(), DALLEDecoder()
    # OpenAI's encoder.pkl and decoder.pkl hold 53.8 and 43.8 million parameters
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in decoder.parameters()) == 43_829_766


def test_dalle_tokens_do_not_depend_on_autocast_without_mixed_precision():
    images = torch.rand(2, 3, 16, 24)
    for tokenizer in (
        DALLEEncoder(n_hid=16, vocab_size=64, mixed_precision=False),
        tokenizers()[1],
    ):
        plain = tokenizer.encode_features(images)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert torch.equal(tokenizer.encode_features(images), plain)


def test_dalle_output_layer_is_float32_under_autocast():
    encoder = DALLEEncoder(n_hid=16, vocab_size=64)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        features = encoder.encode_features(torch.rand(1, 3, 16, 16))
        assert features.dtype == torch.bfloat16
        assert encoder.classify(features.movedim(1, -1)).dtype == torch.float32


def test_dalle_decoder_paints_in_the_encoders_range():
    decoder = DALLEDecoder(n_init=8, n_hid=8, vocab_size=16)
    images = decoder.decode_tokens(torch.randint(16, (2, 3, 2)))
    assert images.shape == (2, 3, 24, 16)
    assert 0.1 <= images.min() and images.max() <= 0.9


def small_dvae(**changes):
    torch.manual_seed(0)
    options = dict(vocab_size=16, codebook_dims=8, hidden_dims=16, num_res_blocks=1) | changes
    return DiscreteVAE(**options)


def test_dvae_losses():
    """loss_usage is the KL divergence from uniform use; one token for all costs log K."""
    dvae = small_dvae(usage_weight=1.0)
    with torch.no_grad():
        dvae.output.weight.zero_()
        dvae.output.bias.zero_()
    losses = dvae(torch.rand(2, 3, 16, 16), mode='loss')
    assert losses['loss_usage'].item() == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        dvae.output.bias[3] = 100
    losses = dvae(torch.rand(2, 3, 16, 16), mode='loss')
    assert losses['loss_usage'].item() == pytest.approx(math.log(16), rel=1e-4)
    assert losses['perplexity'].item() == pytest.approx(1)


def test_dvae_loss_of_gradients():
    """Nothing but the differences of neighbours counts: a shift of all pixels costs nothing."""
    images = torch.rand(2, 3, 16, 16)
    plain = small_dvae()(images, mode='loss')
    assert 'loss_gradient' not in plain

    dvae = small_dvae(gradient_weight=3.0)
    losses = dvae(images, mode='loss')
    assert torch.equal(losses['loss_rec'], plain['loss_rec'])
    dvae.decoder.forward = lambda codes: images + torch.full_like(images, 0.5)
    assert dvae(images, mode='loss')['loss_gradient'].item() == pytest.approx(0, abs=1e-10)
    ramp = 0.1 * torch.arange(16.0).view(16, 1) + 0.2 * torch.arange(16.0)  # rows, columns
    dvae.decoder.forward = lambda codes: images + ramp
    expected = 3 * (0.1**2 + 0.2**2)
    assert dvae(images, mode='loss')['loss_gradient'].item() == pytest.approx(expected, rel=1e-4)


def test_dvae_trains_all_its_parameters():
    dvae = small_dvae()
    losses = dvae(torch.rand(2, 3, 16, 16), mode='loss')
    (losses['loss_rec'] + losses['loss_usage']).backward()
    assert all(p.grad is not None and p.grad.any() for p in dvae.parameters())
    assert not losses['perplexity'].requires_grad


def test_dvae_learns_to_paint():
    """Dark and bright images get tokens of their own and come back from them."""
    dvae = small_dvae(usage_weight=0.1)
    optimizer = torch.optim.AdamW(dvae.parameters(), lr=3e-3)
    images = torch.tensor([-0.8, 0.8]).view(2, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
    for step in range(150):
        dvae.temperature = max(1 - step / 100, 1 / 16)
        losses = dvae(images, mode='loss')
        optimizer.zero_grad()
        (losses['loss_rec'] + losses['loss_usage']).backward()
        optimizer.step()
    dark, bright = (set(tokens.flatten().tolist()) for tokens in dvae.tokenize(images))
    assert dark.isdisjoint(bright)
    assert (dvae(images) - images).abs().mean() < 0.2  # 0.8 without learning


def test_dvae_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="Unknown mode 'predict': choose 'loss' or 'tensor'"):
        small_dvae()(torch.rand(1, 3, 16, 16), mode='predict')


def test_rgb_targets_are_the_pixels_of_the_patch():
    images = torch.rand(2, 3, 8, 12)
    targets = RGBTarget().targets(images, IDS, GRID)
    for b in range(2):
        for m, i in enumerate(IDS[b].tolist()):
            row, column = divmod(i, 3)
            patch = images[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.equal(targets[b, m], patch.flatten())


def test_rgb_targets_may_be_normalised_per_patch():
    targets = RGBTarget(norm_patch=True).targets(torch.rand(2, 3, 8, 12), IDS, GRID)
    torch.testing.assert_close(targets.mean(-1), torch.zeros(2, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(targets.var(-1), torch.ones(2, 2), rtol=1e-3, atol=0)


def test_patches_of_one_colour_have_finite_targets():
    targets = RGBTarget(norm_patch=True).targets(torch.full((2, 3, 8, 12), 0.5), IDS, GRID)
    assert torch.equal(targets, torch.zeros_like(targets))


def test_pixels_of_a_patch():
    assert RGBTarget().out_dims(16) == 768
