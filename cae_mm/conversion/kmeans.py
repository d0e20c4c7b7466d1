"""From a trained encoder to the tokenizer of a second round: k-means of its patch features."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from tqdm import tqdm

from cae_mm.checkpoints.files import write_safetensors
from cae_mm.datasets.resumable import ResumableLoader
from cae_mm.engine.fitting import fit_config
from cae_mm.evaluation.encoder import load_backbone, read_normalizer
from cae_mm.evaluation.tokens import describe_usage
from cae_mm.models import CAEViT, KMeansTokenizer, describe_model
from cae_mm.patches import patchify
from cae_mm.precision import choose_precision

PATCHES_OF_A_CROP = 32  # at most, drawn at random: more of one image are much alike
VECTORS_OF_A_CENTER = 100
HELD_OUT = 0.1  # share of the vectors, which the figures are of
PASSES = 10  # of k-means over the others
CHUNK = 8192  # vectors whose tokens are looked for at a time
MIN_STD = 1e-6


def make_tokenizer(
    cfg: Config,
    checkpoint: str | Path,
    out: str | Path,
    *,
    num_tokens: int = 8192,
    blocks: int | None = None,
    vectors: int | None = None,
    seed: int = 0,
    prefix: str = 'backbone.',
    device: str | None = None,
) -> dict[str, float]:
    """Cluster the features of random crops of a config's training images; write a tokenizer.

    Args:
        cfg: Of the first round, or of any model with a ``CAEViT`` and training images.
        checkpoint: The encoder's weights, or 'random'.
        out: The ``.safetensors`` file to write, of a ``KMeansTokenizer``.
        num_tokens: Number of centres K.
        blocks: Take the features behind so many blocks; None: those of the whole encoder.
        vectors: Patch features to cluster; None: ``VECTORS_OF_A_CENTER`` for each centre.
        seed: Of crops, patches, k-means, and a random encoder.
        prefix: Of the encoder's keys in the checkpoint.
        device: Of the encoder; None: the GPU if there is one.

    Returns:
        ``tokens_used`` by the vectors that were held out, ``perplexity`` of their distribution,
        and ``explained``, the share of these vectors' variance that their tokens explain.

    Raises:
        ValueError: If there are too few vectors, or the encoder is not ours or has fewer blocks.
    """
    count = VECTORS_OF_A_CENTER * num_tokens if vectors is None else vectors
    rest = round(count * HELD_OUT)
    if count - rest < num_tokens:
        raise ValueError(
            f'{count} vectors are too few for {num_tokens} tokens: take {VECTORS_OF_A_CENTER} '
            'for each, or fewer tokens'
        )
    encoder = load_backbone(cfg, checkpoint, prefix, seed)
    if not isinstance(encoder, CAEViT):
        raise ValueError(f'{cfg.filename} has a {type(encoder).__name__}, not a cae_mm.CAEViT')
    tokenizer = KMeansTokenizer(backbone=cfg.model.backbone, vocab_size=num_tokens).eval()
    tokenizer.backbone = _keep_blocks(encoder, encoder.depth if blocks is None else blocks).eval()
    tokenizer.to(device or ('cuda' if torch.cuda.is_available() else 'cpu'))

    features, pixels = _collect(tokenizer, cfg, count, seed)  # [n, D], [n, 3*p*p]
    held_out, seen = features[:rest], features[rest:]
    tokenizer.mean = seen.mean(0)
    tokenizer.std = seen.std(0).clamp(min=MIN_STD)
    standardised = (seen - tokenizer.mean).div_(tokenizer.std)  # in place: it may be gigabytes
    tokenizer.centers = fit_centers(standardised, num_tokens, seed)
    tokenizer.cpu()
    tokens = _tokenize(tokenizer, features)
    tokenizer.patches = mean_by_token(pixels, tokens, num_tokens)
    figures = judge((held_out - tokenizer.mean) / tokenizer.std, tokens[:rest], tokenizer.centers)
    model: Any = SimpleNamespace(
        backbone=tokenizer.backbone, data_preprocessor=read_normalizer(cfg)
    )
    description = describe_model(model)
    assert description is not None  # the encoder is ours
    metadata = dict(encoder=description.to_dict(), kmeans=figures)
    write_safetensors(Path(out), tokenizer.state_dict(), metadata)
    return figures


def _keep_blocks(encoder: CAEViT, blocks: int) -> CAEViT:
    """Leave out the last blocks, and with them the final norm, which is for the last one."""
    if not 1 <= blocks <= encoder.depth:
        raise ValueError(f'blocks must be in [1, {encoder.depth}], not {blocks}')
    if blocks < encoder.depth:
        encoder.blocks, encoder.depth = encoder.blocks[:blocks], blocks
        encoder.norm = nn.Identity()
    return encoder


@torch.no_grad()
def _collect(
    tokenizer: KMeansTokenizer, cfg: Config, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Features and normalised pixels of ``count`` patches of random crops, float32 on the CPU."""
    normalizer = read_normalizer(cfg).to(tokenizer.mean.device)
    autocast = choose_precision(tokenizer.mean.device.type).autocast(tokenizer.mean.device.type)
    generator = torch.Generator().manual_seed(seed)
    features = torch.empty(count, len(tokenizer.mean))
    pixels = torch.empty(count, tokenizer.patches.shape[1])
    found = 0
    with tqdm(desc='features', total=count, unit=' patches', dynamic_ncols=True) as progress:
        for batch in _load_crops(cfg, seed):
            images = normalizer({'inputs': batch})['inputs'][0]  # [B, 3, H, W]
            with autocast:
                maps = tokenizer.encode_features(images).float()  # [B, D, h, w]
            rows = torch.rand(len(images), maps[0, 0].numel(), generator=generator).argsort(1)
            ids = rows[:, :PATCHES_OF_A_CROP].to(images.device).unsqueeze(-1)  # [B, k, 1]
            patches = patchify(images, tokenizer.backbone.patch_size)  # [B, N, 3*p*p]
            new = min(ids.numel(), count - found)
            for values, kept in ((maps.flatten(2).transpose(1, 2), features), (patches, pixels)):
                chosen = values.take_along_dim(ids, 1).flatten(0, 1)  # [B * k, D or 3*p*p]
                kept[found : found + new] = chosen[:new]
            found += new
            progress.update(new)
            if found == count:
                return features, pixels
    raise AssertionError('the crops never end')


def _load_crops(cfg: Config, seed: int) -> Iterator[Any]:
    """View 1 of random crops of training, in an order of the seed's, without an end."""
    fit_config(cfg)
    cfg.train_dataloader.drop_last = False
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmpretrain')):
        loader = ResumableLoader(Runner.build_dataloader(cfg.train_dataloader, seed), seed)
    while True:
        for batch in loader:
            inputs = batch['inputs']
            yield inputs if isinstance(inputs, Tensor) else inputs[0]


def fit_centers(features: Tensor, num_centers: int, seed: int) -> Tensor:
    """Centres of k-means, (K, D), of features (n, D): scikit-learn's, batch by batch.

    It starts from random vectors: k-means++ would take hours for thousands of centres.
    """
    kmeans = MiniBatchKMeans(num_centers, init='random', n_init=1, random_state=seed)
    generator = torch.Generator().manual_seed(seed)
    size = max(4 * num_centers, 1024)
    orders = [torch.randperm(len(features), generator=generator) for _ in range(PASSES)]
    batches = [rows for order in orders for rows in order.split(size) if len(rows) >= num_centers]
    for rows in tqdm(batches, desc='k-means', unit=' batches', dynamic_ncols=True):
        kmeans.partial_fit(features[rows].numpy())
    return torch.from_numpy(np.asarray(kmeans.cluster_centers_, np.float32))


@torch.no_grad()
def _tokenize(tokenizer: KMeansTokenizer, features: Tensor) -> Tensor:
    return torch.cat([tokenizer.classify(part).argmax(-1) for part in features.split(CHUNK)])


def mean_by_token(values: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
    """Mean of the values (n, C) behind each token, (K, C); 0 where there are none."""
    sums = values.new_zeros(num_tokens, values.shape[1]).index_add_(0, tokens, values)
    return sums / tokens.bincount(minlength=num_tokens).clamp(min=1).unsqueeze(1)


def judge(features: Tensor, tokens: Tensor, centers: Tensor) -> dict[str, float]:
    """Figures of ``make_tokenizer``, for standardised features (n, D) and their tokens (n,)."""
    counts = tokens.bincount(minlength=len(centers))
    left = (features - centers[tokens]).square().sum()
    total = (features - features.mean(0)).square().sum()
    return {
        **describe_usage(counts),
        'explained': 1 - (left / total).item(),
    }
