"""UperNet's head and mmsegmentation's: the same function, gradients and state dict."""

import pytest
import torch
import torch.nn.functional as F
from builders import close, randomize
from torch import nn

pytest.importorskip(
    'mmseg.models',
    reason='needs mmsegmentation: make setup EXTRAS=segmentation',
    exc_type=ImportError,
)

from mmengine.registry import MODELS  # noqa: E402

from cae_mm.models.uper_head import UPerHead, conv_of_resized  # noqa: E402


def random_maps(sizes, channels, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, c, *size, generator=generator, dtype=torch.float64, requires_grad=True)
        for c, size in zip(channels, sizes, strict=True)
    ]


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('kernel_size', [1, 3, 5])
@pytest.mark.parametrize('sizes', [[(8, 12), (4, 6), (2, 3)], [(7, 5), (3, 3), (1, 1), (7, 5)]])
def test_convolution_of_resized_maps(sizes, kernel_size, align_corners):
    channels = [3, 2, 4, 1][: len(sizes)]
    maps = random_maps(sizes, channels)
    conv = nn.Conv2d(sum(channels), 5, kernel_size, padding=kernel_size // 2).double()
    resized = [
        F.interpolate(x, sizes[0], mode='bilinear', align_corners=align_corners) for x in maps
    ]
    expected, inputs = conv(torch.cat(resized, dim=1)), [*maps, *conv.parameters()]
    out = conv_of_resized(conv, maps, align_corners)
    close(out, expected)
    weights = torch.randn_like(out)
    close(*(torch.autograd.grad((x * weights).sum(), inputs) for x in (out, expected)))


def head_config(**changes):
    config = dict(
        in_channels=[4, 6, 5, 3],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3),
        channels=8,
        dropout_ratio=0.0,
        num_classes=7,
        norm_cfg=dict(type='BN'),
        align_corners=False,
    )
    return config | changes


@pytest.mark.parametrize(
    'changes', [{}, {'align_corners': True}, {'norm_cfg': None, 'act_cfg': None}], ids=str
)
@pytest.mark.parametrize('training', [True, False])
def test_head_is_that_of_mmsegmentation(training, changes):
    theirs = MODELS.build(dict(type='mmseg.UPerHead', **head_config(**changes)))
    randomize(theirs).double().train(training)
    name = f'{UPerHead.__module__}.{UPerHead.__name__}'  # as in our configs
    ours = MODELS.build(dict(type=name, **head_config(**changes))).double().train(training)
    ours.load_state_dict(theirs.state_dict())
    sizes = [(17, 25), (9, 13), (5, 7), (3, 4)]  # mmsegmentation warns of others if aligned
    results = []
    for head in (theirs, ours):
        maps = random_maps(sizes, head.in_channels)
        out = head(maps)
        (out**2).sum().backward()
        grads = {name: param.grad for name, param in head.named_parameters()}
        results.append((out, [x.grad for x in maps], grads, head.state_dict()))
    close(*results, 1e-8)
