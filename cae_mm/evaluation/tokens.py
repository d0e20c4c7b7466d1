"""A tokenizer judged in minutes: how its tokens are used, and what they tell of the classes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from cae_mm.evaluation.encoder import read_size
from cae_mm.evaluation.features import extract_features, labelled_images, subset_rows
from cae_mm.evaluation.linear import check_class_sizes, hold_out, logistic_regression
from cae_mm.models.targets.tokenizer import Tokenizer
from cae_mm.patches import grid_of
from cae_mm.precision import choose_precision


class TokenReader:
    """Tokens of whole images, as the target generator of a config gives them.

    Args:
        cfg: Of a pretraining with tokens; the tokenizer's weights come from its ``init_cfg``.
        device: Where the tokenizer runs.
    """

    def __init__(self, cfg: Config, device: str) -> None:
        self.device = torch.device(device)
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            tokenizer: Any = MODELS.build(cfg.model.target_generator)
            self.preprocessor: Any = MODELS.build(
                cfg.model.get('data_preprocessor') or dict(type='cae_mm.CAEDataPreprocessor')
            )
        if not isinstance(tokenizer, Tokenizer):
            raise ValueError(
                f'{type(tokenizer).__name__} makes no tokens: judge the config of a tokenizer'
            )
        tokenizer.init_weights()
        self.tokenizer: Any = tokenizer.to(self.device).eval()
        self.preprocessor.to(self.device)
        self.precision = choose_precision(self.device.type)
        self.size = read_size(cfg)
        if self.view == 1:
            grid = grid_of(self.size, cfg.model.backbone.get('patch_size', 16))
            self.size = grid[0] * tokenizer.reduction, grid[1] * tokenizer.reduction
        self.errors: list[Tensor] = []  # mean squared error of each painted image, pixels in [0, 1]

    @property
    def view(self) -> int:
        """Which view the tokenizer reads."""
        return self.tokenizer.view

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Tokens, int64 (B, N), of uint8 images (B, 3, H, W), BGR."""
        inputs = self.preprocessor({'inputs': [images] * (self.view + 1)})['inputs'][self.view]
        with self.precision.autocast(self.device.type):
            tokens = self.tokenizer.tokenize(inputs)  # [B, h, w]
        if hasattr(self.tokenizer, 'decode_tokens'):
            difference = self.tokenizer.decode_tokens(tokens) - inputs
            scaled = difference * self.preprocessor.stds[self.view] / 255
            self.errors.append(scaled.square().mean((1, 2, 3)).cpu())
        return tokens.flatten(1)


def judge_tokens(
    cfg: Config,
    folder: str | Path,
    *,
    max_images: int | None = None,
    seed: int = 0,
    device: str = 'cpu',
    batch_size: int = 64,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Judge the tokenizer of a pretraining config on central crops of labelled training images.

    A fifth of the images is held out; a logistic regression on the square roots of token
    frequencies, which knows nothing of where a token stands, is fitted to the rest.

    Args:
        cfg: As of ``TokenReader``.
        folder: Training images with one sub-folder for each class.
        max_images: At most so many of them, drawn at random.
        seed: Of the part that is held out.
        device: Where the tokenizer runs.
        batch_size: Of reading.
        num_workers: See ``extract_features``.

    Returns:
        ``images`` and ``chance``; ``tokens_used`` and ``perplexity`` over all images;
        ``error``, the mean squared error of painted images with pixels in [0, 1] (None if nothing
        paints); ``accuracy`` on the part that is held out.
    """
    reader: Any = TokenReader(cfg, device)
    images = labelled_images(folder, reader.size)
    rows = subset_rows(images, max_images)
    labels = np.array(images.targets)[rows]
    check_class_sizes(labels, images.classes)
    loading: dict[str, Any] = dict(batch_size=batch_size, num_workers=num_workers, title='tokens')
    tokens = torch.cat([*extract_features(reader, images, rows, **loading)])  # [n, N]
    counts = count_tokens(tokens, reader.tokenizer.vocab_size)
    frequencies = (counts / tokens.shape[1]).sqrt().numpy()
    train, held_out = hold_out((frequencies, labels), seed)
    probe = logistic_regression(train, held_out, seed=seed)
    return {
        'images': len(rows),
        'chance': float(np.bincount(labels).max() / len(rows)),
        **describe_usage(counts.sum(0)),
        'error': torch.cat(reader.errors).mean().item() if reader.errors else None,
        'accuracy': probe['accuracy'],
    }


def describe_usage(counts: Tensor) -> dict[str, float]:
    """``tokens_used`` and ``perplexity`` of tokens that came up so many times, shape (K,)."""
    return {
        'tokens_used': int(counts.count_nonzero()),
        'perplexity': torch.special.entr(counts / counts.sum()).sum().exp().item(),
    }


def count_tokens(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each image (B, N) has each token: float32 (B, K)."""
    counts = torch.zeros(len(tokens), vocab_size)
    return counts.scatter_add_(1, tokens, torch.ones(tokens.shape))
