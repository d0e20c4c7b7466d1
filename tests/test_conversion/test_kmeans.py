"""A tokenizer of the encoder of a first round: from its features to the tokens of a second."""

import uuid

import pytest
import torch
from builders import GRID, PATCH, WIDTH, build_cae, cae_config, make_batch, make_images, run_tool
from mmengine.config import Config
from mmengine.registry import MODELS
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import pairwise_distances_argmin

from cae_mm.checkpoints import read_checkpoint
from cae_mm.conversion.kmeans import fit_centers, judge, make_tokenizer, mean_by_token
from cae_mm.engine import CAERunner
from cae_mm.models import KMeansTokenizer

TOKENS, VECTORS = 8, 200
SIDE = GRID[0] * PATCH
IMAGES = dict(a=60, b=150, c=250)  # classes and their brightness


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with images and the checkpoint of a first round."""
    make_images(tmp_path / 'images', IMAGES, 4)
    torch.save(dict(state_dict=build_cae().state_dict()), tmp_path / 'epoch_1.pth')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def first_round(images='images', **changes):
    """Config of a training on a folder, pixels as targets."""
    pipeline = [
        dict(type='cae_mm.LoadImage'),
        dict(type='cae_mm.TwoViewResizedCrop', size=SIDE, second_size=None),
        dict(type='cae_mm.CAEMaskGenerator', patch_size=PATCH, min_block=1),
        dict(type='mmpretrain.PackInputs'),
    ]
    dataset = dict(
        type='mmpretrain.CustomDataset', data_root=str(images), with_label=False, pipeline=pipeline
    )
    pixels = dict(
        target_generator=dict(type='cae_mm.RGBTarget'),
        neck=dict(out_dims=3 * PATCH**2),
    )
    return Config(
        dict(
            default_scope='mmpretrain',
            model=cae_config(**{**pixels, **changes}),
            train_dataloader=dict(
                batch_size=5,
                num_workers=0,
                drop_last=True,
                sampler=dict(type='DefaultSampler', shuffle=True),
                collate_fn=dict(type='default_collate'),
                dataset=dataset,
            ),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
            train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1),
            experiment_name=uuid.uuid4().hex,  # mmengine keeps what has a name
        )
    )


def make(out='tokenizer.safetensors', checkpoint='epoch_1.pth', images='images', **options):
    """Make a small tokenizer on the CPU."""
    options = dict(num_tokens=TOKENS, vectors=VECTORS, device='cpu') | options
    return make_tokenizer(first_round(images), checkpoint, out, **options)


def target(path, **backbone):
    """The target generator of a second round."""
    return dict(
        type='cae_mm.KMeansTokenizer',
        backbone={**cae_config()['backbone'], **backbone},
        vocab_size=TOKENS,
        init_cfg=dict(type='Pretrained', checkpoint=str(path)),
    )


def load(path, **backbone):
    tokenizer = MODELS.build(target(path, **backbone))
    tokenizer.init_weights()
    return tokenizer.eval()


def test_token_is_the_nearest_center(work):
    make()
    tokenizer, images = load('tokenizer.safetensors'), make_batch()[0][0]
    tokens = tokenizer.tokenize(images)
    assert tokens.shape == (3, *GRID) and tokens.unique().numel() > 2
    features = tokenizer.backbone.forward_features(images)[:, 1:].flatten(0, 1)
    standardised = ((features - tokenizer.mean) / tokenizer.std).detach().numpy()
    nearest = pairwise_distances_argmin(standardised, tokenizer.centers.numpy())
    assert tokens.flatten().tolist() == nearest.tolist()


def test_encoder_is_the_one_of_the_first_round(work):
    make()
    tokenizer, first = load('tokenizer.safetensors'), build_cae().backbone
    for name, value in first.state_dict().items():
        assert torch.equal(tokenizer.backbone.state_dict()[name], value), name
    encoder = read_checkpoint('tokenizer.safetensors').description
    assert encoder.pretrain_img_size == (SIDE, SIDE) and encoder.mean == (123.675, 116.28, 103.53)


def test_blocks_that_are_left_out_take_the_final_norm_along(work):
    make(blocks=1)
    arch = dict(cae_config()['backbone']['arch'], depth=1)
    tokenizer = load('tokenizer.safetensors', arch=arch, final_norm=False)
    images = make_batch()[0][0]
    expected = build_cae(backbone=dict(out_indices=(0,))).eval().backbone(images)[0][:, 1:]
    features = tokenizer.encode_features(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(features, expected)
    with pytest.raises(ValueError, match='missing: .*blocks.1'):
        load('tokenizer.safetensors')


def test_same_seed_same_file(work):
    figures = [make(f'{i}.safetensors', seed=seed) for i, seed in enumerate((0, 0, 1))]
    states = [read_checkpoint(f'{i}.safetensors').state for i in range(3)]
    assert figures[0] == figures[1]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]['centers'], states[2]['centers'])


def test_only_images_of_the_config_are_seen(work):
    """Statistics and centres are of black images where all images of the folder are black."""
    make_images(work / 'black', dict(a=1), 2)
    make('black.safetensors', images='black', num_tokens=1, vectors=64)
    state = read_checkpoint('black.safetensors').state
    black = -torch.tensor([123.675, 116.28, 103.53]) / torch.tensor([58.395, 57.12, 57.375])
    expected = black.repeat_interleave(PATCH**2)[None]
    torch.testing.assert_close(state['patches'], expected, rtol=1e-4, atol=1e-4)


def test_figures_are_of_vectors_that_were_held_out(work):
    figures = make()
    assert read_checkpoint('tokenizer.safetensors').metadata['kmeans'] == figures
    assert 2 < figures['perplexity'] <= figures['tokens_used'] <= TOKENS
    assert 0 < figures['explained'] < 1


def test_judge_and_means_by_hand():
    features = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    tokens, centers = torch.tensor([0, 0, 2, 2]), torch.tensor([[1.0], [5.0], [11.0]])
    figures = judge(features, tokens, centers)
    assert figures['tokens_used'] == 2 and figures['perplexity'] == pytest.approx(2)
    assert figures['explained'] == pytest.approx(1 - 4 / 104)
    assert mean_by_token(features, tokens, 3).tolist() == [[1.0], [0.0], [11.0]]


def test_centers_are_as_good_as_those_of_a_whole_fit():
    """Well separated clusters are found; inertia is that of scikit-learn's own loop."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2000, 6, generator=generator)
    whole = MiniBatchKMeans(16, n_init=3, random_state=0).fit(features.numpy())
    ours = fit_centers(features, 16, seed=0)
    inertia = torch.cdist(features, ours).square().amin(1).sum()
    assert inertia < 1.03 * whole.inertia_


def test_painted_tokens_are_mean_patches(work):
    make()
    tokenizer = load('tokenizer.safetensors')
    tokens = torch.tensor([[[0, 1, 2], [3, 4, 5]]])
    images = tokenizer.decode_tokens(tokens)
    assert images.shape == (1, 3, 2 * PATCH, 3 * PATCH)
    corner = images[0, :, PATCH:, 2 * PATCH :]
    assert torch.equal(corner.flatten(), tokenizer.patches[5])


def test_two_rounds(work):
    """Train, tokenise, train again: only the second encoder learns, and only it is saved."""
    first = first_round()
    first.work_dir = 'first'
    CAERunner.from_cfg(first).train()
    path = work / 'tokenizer.safetensors'
    make(checkpoint='first/epoch_1.pth')
    second = first_round(target_generator=target(path), neck=dict(out_dims=TOKENS))
    second.work_dir = 'second'
    runner = CAERunner.from_cfg(second)
    runner.train()
    tokenizer = runner.model.target_generator
    expected = read_checkpoint(path).state
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert not tokenizer.training
    assert all(p.grad is None and not p.requires_grad for p in tokenizer.parameters())
    saved = read_checkpoint('second/epoch_1.pth').state
    assert saved.keys() == runner.model.state_dict().keys()
    assert not [key for key in saved if 'target_generator' in key]
    assert not torch.equal(saved['backbone.cls_token'], expected['backbone.cls_token'])


def test_gradients_do_not_reach_the_tokenizer(work):
    make()
    model = build_cae(
        target_generator=target('tokenizer.safetensors'), neck=dict(out_dims=TOKENS)
    ).train()
    views, samples = make_batch()
    views[0].requires_grad_(True)
    losses = model(views[:1], samples, mode='loss')
    (losses['loss_main'] + losses['loss_align']).backward()
    assert all(p.grad is None for p in model.target_generator.parameters())
    assert model.backbone.cls_token.grad.any()
    tokens = model.target_generator.tokenize(views[0])
    assert not tokens.requires_grad and tokens.dtype == torch.int64


def test_tool_says_how_good_the_tokenizer_is(work, capsys):
    first_round().dump('config.py')
    options = ['--tokens', TOKENS, '--vectors', VECTORS, '--device', 'cpu']
    run_tool(
        'make_tokenizer.py', 'config.py', 'epoch_1.pth', '--out', 'out/t.safetensors', *options
    )
    printed = capsys.readouterr().out
    figures = read_checkpoint('out/t.safetensors').metadata['kmeans']
    assert f'{figures["tokens_used"]} of {TOKENS}' in printed
    assert f'{figures["perplexity"]:.1f}' in printed and f'{figures["explained"]:.1%}' in printed


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(vectors=8), ValueError, '8 vectors are too few for 8 tokens: take 100 for each'),
        (dict(blocks=3), ValueError, r'blocks must be in \[1, 2\], not 3'),
        (dict(checkpoint='none.pth'), FileNotFoundError, 'no weights for CAEViT at'),
        (dict(images='none'), FileNotFoundError, 'none'),
    ],
)
def test_mistakes_are_said_before_any_work(work, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)
    assert not (work / 'tokenizer.safetensors').exists()


def test_other_encoders_are_refused(work):
    cfg = first_round()
    cfg.model.backbone = dict(type='mmpretrain.VisionTransformer', arch='deit-tiny')
    with pytest.raises(ValueError, match='VisionTransformer, not a cae_mm.CAEViT'):
        make_tokenizer(cfg, 'random', 't.safetensors', num_tokens=TOKENS, vectors=VECTORS)


def test_misfits_of_the_second_round_are_named(work):
    make()
    with pytest.raises(ValueError, match='2x2 pixels.*4x4.*the first round needs the same'):
        build_cae(
            target_generator=target('tokenizer.safetensors', patch_size=2),
            neck=dict(out_dims=TOKENS),
        )
    with pytest.raises(ValueError, match='num_heads'):
        load(
            'tokenizer.safetensors',
            arch=dict(cae_config()['backbone']['arch'], num_heads=4),
        )
    with pytest.raises(FileNotFoundError, match='none.pth.*tools/make_tokenizer.py'):
        load('none.pth')


def test_random_tokenizers_have_the_widths_of_their_encoder():
    tokenizer = KMeansTokenizer(backbone=cae_config()['backbone'], vocab_size=TOKENS)
    assert tokenizer.centers.shape == (TOKENS, WIDTH) and tokenizer.out_dims(PATCH) == TOKENS
