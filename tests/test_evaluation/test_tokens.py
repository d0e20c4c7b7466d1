"""What is said of tokenizers is true."""

import json

import pytest
import torch
from builders import PATCH, VOCAB, cae_config, make_images, run_tool
from mmengine.config import Config
from mmengine.registry import MODELS

from cae_mm.evaluation import linear
from cae_mm.evaluation.features import labelled_images
from cae_mm.evaluation.tokens import TokenReader, count_tokens, judge_tokens

CLASSES = dict(dark=60, middle=150, bright=250)
RANGE = dict(
    data_preprocessor=dict(
        type='cae_mm.CAEDataPreprocessor', second_mean=[127.5] * 3, second_std=[127.5] * 3
    )
)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Images of three classes, and the weights of a d-VAE that tells brightness."""
    monkeypatch.setattr(linear, 'CS', (1e-2, 1.0))
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / 'train', CLASSES, 15)
    torch.manual_seed(0)
    dvae = MODELS.build(cae_config()['target_generator'])
    images = torch.rand(8, 1, 1, 1).expand(-1, 3, 32, 32) * 2 - 1
    with torch.no_grad():  # random weights give one token to all images: take its lead away
        dvae.output.bias -= dvae.classify(dvae.encode_features(images).movedim(1, -1)).mean(
            (0, 1, 2)
        )
    torch.save(dvae.state_dict(), 'dvae.pth')
    return tmp_path


def config(**target):
    options = cae_config()['target_generator'] | dict(
        init_cfg=dict(type='Pretrained', checkpoint='dvae.pth')
    )
    return Config(dict(model=cae_config(**RANGE, target_generator=options | target)))


def kmeans():
    """Centres of pure brightness: the first patch embedding is all that tells."""
    return dict(type='cae_mm.KMeansTokenizer', backbone=cae_config()['backbone'], vocab_size=VOCAB)


def test_figures_by_hand(work):
    figures = judge_tokens(config(), 'train', num_workers=0)
    reader = TokenReader(config(), 'cpu')
    images = labelled_images('train', (32, 32))  # 8 pixels for each of 4 x 4 patches
    batch = torch.stack([image for image, _ in images])
    normalised = batch.flip(1) / 127.5 - 1
    tokenizer = reader.tokenizer
    tokens = tokenizer.tokenize(normalised)
    painted = tokenizer.decode_tokens(tokens)
    assert torch.equal(reader(batch), tokens.flatten(1))
    assert figures['error'] == pytest.approx((painted - normalised).square().mean().item() / 4)
    counts = torch.bincount(tokens.flatten(), minlength=VOCAB).double()
    p = counts[counts > 0] / counts.sum()
    assert figures['tokens_used'] == len(p)
    assert figures['perplexity'] == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-5)
    assert figures['images'] == 45 and figures['chance'] == pytest.approx(1 / 3)


def test_tokens_that_tell_classes_score_and_constant_ones_do_not(work):
    good = judge_tokens(config(), 'train', num_workers=0)
    state = torch.load('dvae.pth', weights_only=True)
    state['output.bias'][3] = 1e4  # one token for all
    torch.save(state, 'dvae.pth')
    poor = judge_tokens(config(), 'train', num_workers=0)
    assert good['accuracy'] > 0.8
    assert poor['accuracy'] == pytest.approx(1 / 3) and poor['tokens_used'] == 1
    assert poor['perplexity'] == pytest.approx(1)


def test_counts():
    tokens = torch.tensor([[0, 2, 2], [1, 1, 1]])
    assert count_tokens(tokens, 4).tolist() == [[1, 0, 2, 0], [0, 3, 0, 0]]


def test_first_view_is_read_at_the_encoders_size(work):
    tokenizer = MODELS.build(kmeans())
    torch.save(tokenizer.state_dict(), 'kmeans.pth')
    target = kmeans() | dict(init_cfg=dict(type='Pretrained', checkpoint='kmeans.pth'))
    reader = TokenReader(Config(dict(model=cae_config(target_generator=target))), 'cpu')
    assert reader.size == (4 * PATCH, 4 * PATCH)
    image = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]]).view(2, 3, 1, 1)
    normalised = (image.flip(1) - mean) / std
    assert torch.equal(reader(image), reader.tokenizer.eval().tokenize(normalised).flatten(1))


def test_tool_prints_the_figures(work, capsys):
    config().dump('config.py')
    options = ['--max-images', 30, '--num-workers', 0, '--device', 'cpu']
    run_tool('judge_tokens.py', 'config.py', '--train', 'train', *options)
    expected = judge_tokens(config(), 'train', max_images=30, num_workers=0)
    assert json.loads(capsys.readouterr().out) == expected


def test_mistakes_are_named(work):
    with pytest.raises(ValueError, match='RGBTarget makes no tokens'):
        TokenReader(
            Config(dict(model=cae_config(target_generator=dict(type='cae_mm.RGBTarget')))), 'cpu'
        )
    with pytest.raises(FileNotFoundError, match='none.pth'):
        judge_tokens(config(init_cfg=dict(type='Pretrained', checkpoint='none.pth')), 'train')
    with pytest.raises(FileNotFoundError, match='none is no labelled folder'):
        judge_tokens(config(), 'none')
