"""Two views, each normalised in its own way."""

import pytest
import torch
from mmengine.registry import MODELS
from mmpretrain.structures import DataSample

import cae_mm.registry  # noqa: F401
from cae_mm.models import CAEDataPreprocessor

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, RGB


@pytest.fixture
def views():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
        for size in (8, 4)
    ]


def test_views_by_formula(views):
    """View 1 by ImageNet's statistics, view 2 by DALL-E's x -> 0.8 x + 0.1; BGR becomes RGB."""
    given = [view.clone() for view in views]
    view1, view2 = CAEDataPreprocessor()(dict(inputs=views))['inputs']
    assert view1.dtype == view2.dtype == torch.float32
    for rgb in range(3):
        bgr = 2 - rgb
        expected = (views[0][:, bgr].float() - MEAN[rgb]) / STD[rgb]
        torch.testing.assert_close(view1[:, rgb], expected, rtol=0, atol=1e-5)
        expected = 0.8 * views[1][:, bgr].float() / 255 + 0.1
        torch.testing.assert_close(view2[:, rgb], expected, rtol=0, atol=1e-6)
    assert all((a == b).all() for a, b in zip(views, given, strict=True))


def test_dalles_range_is_hit():
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    _, view2 = CAEDataPreprocessor()(dict(inputs=[ends, ends]))['inputs']
    assert view2[0].unique().tolist() == pytest.approx([0.1])
    assert view2[1].unique().tolist() == pytest.approx([0.9])


def test_own_statistics(views):
    """A d-VAE of one's own takes [-1, 1]; here the images are RGB already."""
    preprocessor = CAEDataPreprocessor(
        mean=(1, 2, 3), std=(2, 4, 8), second_mean=[127.5] * 3, second_std=[127.5] * 3, to_rgb=False
    )
    view1, view2 = preprocessor(dict(inputs=views))['inputs']
    for channel, (mean, std) in enumerate([(1, 2), (2, 4), (3, 8)]):
        expected = (views[0][:, channel].float() - mean) / std
        torch.testing.assert_close(view1[:, channel], expected)
    torch.testing.assert_close(view2, views[1].float() / 127.5 - 1)


def test_one_view_in_a_list_or_alone(views):
    preprocessor = CAEDataPreprocessor()
    both = preprocessor(dict(inputs=views))['inputs']
    for inputs in ([views[0]], views[0]):
        out = preprocessor(dict(inputs=inputs))
        [alone] = out['inputs']
        torch.testing.assert_close(alone, both[0], rtol=0, atol=0)
        assert out['data_samples'] is None


def test_data_samples_are_left_alone(views):
    """Masks stay in host memory, wherever the images go; 'meta' stands for a device."""
    samples = [DataSample(mask=torch.rand(4) < 0.5) for _ in range(2)]
    preprocessor = CAEDataPreprocessor().to('meta')
    out = preprocessor(dict(inputs=views, data_samples=samples), training=True)
    assert [view.device.type for view in out['inputs']] == ['meta', 'meta']
    assert out['data_samples'] is samples
    assert all(sample.mask.device.type == 'cpu' for sample in samples)
    assert all(sample.mask.dtype == torch.bool for sample in samples)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_on_a_gpu(views):
    samples = [DataSample(mask=torch.rand(4) < 0.5) for _ in range(2)]
    expected = CAEDataPreprocessor()(dict(inputs=views))['inputs']
    pinned = [view.pin_memory() for view in views]
    out = CAEDataPreprocessor().to('cuda')(dict(inputs=pinned, data_samples=samples))
    for got, want in zip(out['inputs'], expected, strict=True):
        assert got.device.type == 'cuda'
        torch.testing.assert_close(got.cpu(), want)
    assert all(sample.mask.device.type == 'cpu' for sample in out['data_samples'])


def test_statistics_are_not_saved():
    assert not CAEDataPreprocessor().state_dict()


def test_statistics_stay_float32_under_autocast(views):
    with torch.autocast('cpu', torch.bfloat16):
        low = CAEDataPreprocessor()(dict(inputs=views))['inputs']
    full = CAEDataPreprocessor()(dict(inputs=views))['inputs']
    for a, b in zip(low, full, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_defaults_of_a_config(views):
    """Lists, as a config file has them."""
    cfg = dict(type='cae_mm.CAEDataPreprocessor', mean=list(MEAN), std=list(STD))
    got = MODELS.build(cfg)(dict(inputs=views))['inputs']
    expected = CAEDataPreprocessor()(dict(inputs=views))['inputs']
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_copies_to_a_device_do_not_wait():
    copied = []

    class View(torch.Tensor):
        def to(self, *_, non_blocking=False, **__):
            copied.append(non_blocking)
            return self

    view = torch.zeros(1, 3, 2, 2).as_subclass(View)
    CAEDataPreprocessor()(dict(inputs=view))
    assert copied == [True]
