"""The published d-VAE of DALL-E: tokenizer (encoder) and painter (decoder).

Layer names are those of the published weights, so that converted files load strictly.

References:
    Paper: https://arxiv.org/abs/2102.12092
    Structure: https://github.com/openai/DALL-E/blob/master/dall_e/encoder.py and decoder.py
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cae_mm.checkpoints import PretrainedModule
from cae_mm.models.targets.tokenizer import Tokenizer, without_autocast
from cae_mm.registry import MODELS

IMAGES_ON_CPU = 2  # at a time: larger maps leave the caches and are a sixth slower


class Conv2d(nn.Module):
    """Convolution with the published parameter names ``w`` and ``b``, size-preserving padding."""

    def __init__(self, n_in: int, n_out: int, kernel_size: int) -> None:
        super().__init__()
        std = (n_in * kernel_size**2) ** -0.5
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel_size, kernel_size).normal_(std=std))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``, shape (B, n_in, H, W)."""
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class ResBlock(nn.Module):
    """Bottleneck block; encoder and decoder differ in where the 1x1 convolution stands."""

    def __init__(self, n_in: int, n_out: int, kernels: Sequence[int], gain: float) -> None:
        super().__init__()
        self.post_gain = gain
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        layers: dict[str, nn.Module] = {}
        widths = [n_in, *[n_out // 4] * 3, n_out]
        for i, (conv, kernel) in enumerate(zip(pairwise(widths), kernels, strict=True), start=1):
            relu = nn.ReLU(
                inplace=i > 1
            )  # the first reads the block's input, which is needed again
            layers |= {f'relu_{i}': relu, f'conv_{i}': Conv2d(*conv, kernel)}
        self.res_path = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``, shape (B, n_in, H, W)."""
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.post_gain)


def _network(
    first: nn.Module,
    widths: Sequence[int],
    blocks_per_group: int,
    kernels: Sequence[int],
    resample: dict[str, nn.Module],
    n_out: int,
) -> nn.Sequential:
    """Groups of blocks with a resampling layer behind all but the last, and an output layer."""
    layers = {'input': first}
    num_groups = len(widths) - 1
    for g, (n_in, n_hid) in enumerate(pairwise(widths), start=1):
        group: dict[str, nn.Module] = {
            f'block_{b + 1}': ResBlock(
                n_hid if b else n_in, n_hid, kernels, gain=1 / (num_groups * blocks_per_group) ** 2
            )
            for b in range(blocks_per_group)
        }
        if g < num_groups:
            group |= resample
        layers[f'group_{g}'] = nn.Sequential(OrderedDict(group))
    output = OrderedDict(relu=nn.ReLU(), conv=Conv2d(widths[-1], n_out, 1))
    return nn.Sequential(OrderedDict(layers | {'output': nn.Sequential(output)}))


@MODELS.register_module()
class DALLEEncoder(Tokenizer):
    """DALL-E's encoder: images to tokens, 8 pixels of a side per token.

    Args:
        n_hid: Width of the first group; the last has 8 times as many channels.
        blocks_per_group: Blocks in each of the 4 groups.
        vocab_size: Number of tokens.
        mixed_precision: Whether the convolutions of a step under autocast run in float16 on a
            GPU, as OpenAI's do, or in the step's own format on a CPU. The output layer is float32
            always, as in OpenAI's code. With False all is float32 and tokens do not depend on
            autocast.
        init_cfg: ``dict(type='Pretrained', checkpoint='cae_ckpt/dalle_encoder.safetensors')``.
    """

    def __init__(
        self,
        *,
        n_hid: int = 256,
        blocks_per_group: int = 2,
        vocab_size: int = 8192,
        mixed_precision: bool = True,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.vocab_size = vocab_size
        self.mixed_precision = mixed_precision
        self.blocks: Any = _network(
            Conv2d(3, n_hid, 7),
            [n_hid, n_hid, 2 * n_hid, 4 * n_hid, 8 * n_hid],
            blocks_per_group,
            kernels=(3, 3, 3, 1),
            resample={'pool': nn.MaxPool2d(2)},
            n_out=vocab_size,
        )
        self.to(memory_format=torch.channels_last)

    def encode_features(self, images: Tensor) -> Tensor:
        """Run all but the output layer: (B, 3, h, w) in [0.1, 0.9] -> (B, 8 * n_hid, h/8, w/8)."""
        device, network = images.device.type, self.blocks[:-1]
        dtype = images.dtype
        if device != 'meta' and self.mixed_precision and torch.is_autocast_enabled(device):
            dtype = torch.float16 if device == 'cuda' else torch.get_autocast_dtype(device)
        weights = {name: w.to(dtype) for name, w in network.named_parameters()}  # cast once
        images = images.to(dtype, memory_format=torch.channels_last)
        chunks = images.split(IMAGES_ON_CPU) if device == 'cpu' else [images]
        with without_autocast(images):
            return torch.cat([functional_call(network, weights, chunk) for chunk in chunks])

    def classify(self, features: Tensor) -> Tensor:
        """Logits of features (..., 8 * n_hid), always in (at least) float32."""
        conv = self.blocks.output.conv
        with without_autocast(features):
            x = self.blocks.output.relu(features.to(conv.w.dtype))
            return F.linear(x, conv.w.flatten(1), conv.b)


@MODELS.register_module()
class DALLEDecoder(PretrainedModule):
    """DALL-E's decoder: tokens to images. Used for pictures only.

    Args:
        n_init: Width of the token embedding.
        n_hid: Width of the last group; the first has 8 times as many channels.
        blocks_per_group: Blocks in each of the 4 groups.
        vocab_size: Number of tokens.
        init_cfg: ``dict(type='Pretrained', checkpoint='cae_ckpt/dalle_decoder.safetensors')``.
    """

    def __init__(
        self,
        *,
        n_init: int = 128,
        n_hid: int = 256,
        blocks_per_group: int = 2,
        vocab_size: int = 8192,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.vocab_size = vocab_size
        self.blocks: Any = _network(
            Conv2d(vocab_size, n_init, 1),
            [n_init, 8 * n_hid, 4 * n_hid, 2 * n_hid, n_hid],
            blocks_per_group,
            kernels=(1, 3, 3, 3),
            resample={'upsample': nn.Upsample(scale_factor=2)},
            n_out=6,
        )

    @torch.no_grad()
    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Paint tokens (B, h, w) as images (B, 3, 8h, 8w) in [0.1, 0.9], the encoder's range.

        The six outputs are location and scale of a logit-Laplace distribution (appendix A.3 of
        the paper); its location is shown.
        """
        x = F.one_hot(tokens, self.vocab_size).movedim(-1, 1).to(self.blocks.input.w.dtype)
        return self.blocks(x)[:, :3].sigmoid().clamp(0.1, 0.9)
