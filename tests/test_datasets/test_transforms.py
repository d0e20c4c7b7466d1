"""Two views of one crop, alone and in the pipeline of the configs."""

import math
import re

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given
from hypothesis import strategies as st
from mmengine.dataset import Compose, default_collate
from mmengine.registry import TRANSFORMS
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop

import cae_mm.registry  # noqa: F401
from cae_mm.datasets import TwoViewResizedCrop

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def picture(height, width):
    """A smooth one whose channels differ."""
    rows, columns = np.mgrid[:height, :width]
    channels = (
        128 + 100 * np.sin(rows / 9) * np.cos(columns / 13),
        2 * rows + 0.5 * columns,
        255 - 2 * columns,
    )
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


@pytest.fixture
def photo():
    return picture(90, 120)


def crop_at(transform, box):
    """Let ``transform`` take the crop (left, top, width, height)."""
    transform._draw_crop = lambda W, H: box
    return transform


def difference(a, b):
    return np.abs(a.astype(float) - b.astype(float)).mean()


def ranges(low, high):
    numbers = st.floats(low, high)
    return st.tuples(numbers, numbers).map(lambda pair: tuple(sorted(pair)))


@given(
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    views=st.lists(st.sampled_from([(8, 30), (24, 24), (48, 16)]), min_size=1, max_size=2),
    interpolations=st.tuples(*[st.sampled_from(['bilinear', 'bicubic', 'lanczos'])] * 2),
    scale=ranges(0.01, 1.0),
    ratio=ranges(0.2, 5.0),
    central=st.booleans(),
    flip=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_all_views_show_the_crop_that_was_drawn(
    size, views, interpolations, scale, ratio, central, flip, seed
):
    """They are Pillow's of one crop, which lies in the image and within the ranges."""
    (H, W), image = size, picture(*size)
    transform = TwoViewResizedCrop(
        *(views if len(views) == 2 else (*views, None)),
        **dict(zip(('interpolation', 'second_interpolation'), interpolations)),
        **dict(scale=scale, ratio=ratio, central=central, flip_prob=float(flip)),
    )
    np.random.seed(seed)
    results = transform(dict(img=image, ori_shape=size))
    np.testing.assert_array_equal(image, picture(*size))  # is left as it was
    np.random.seed(seed)
    np.random.random(int(flip))  # is drawn first
    left, top, w, h = box = (transform._central_crop if central else transform._draw_crop)(W, H)

    assert left >= 0 and top >= 0 and 0 < w <= W - left and 0 < h <= H - top
    if box != transform._central_crop(W, H):
        assert (w + 0.5) * (h + 0.5) >= scale[0] * W * H
        assert (w - 0.5) * (h - 0.5) <= scale[1] * W * H
        low, high = (limit * views[0][1] / views[0][0] for limit in ratio)
        assert (w + 0.5) / (h - 0.5) >= low and (w - 0.5) / (h + 0.5) <= high
    crop = Image.fromarray(image[:, ::-1] if flip else image)
    crop = crop.crop((left, top, left + w, top + h))
    assert results['img_shape'] == views[0] and results['ori_shape'] == size
    for view, shape, how in zip(results['img'], views, interpolations):
        assert view.dtype == np.uint8 and view.shape == (*shape, 3)
        theirs = crop.resize(shape[::-1], Image.Resampling[how.upper()])
        np.testing.assert_allclose(view, np.asarray(theirs), atol=2)
    assert len(results['img']) == len(views)


@pytest.mark.parametrize('size', [(8, 24), (24, 8), (16, 16)])
def test_an_image_of_the_size_s_shape_is_hardly_stretched(size):
    """Within the range that is the official one's for squares; the whole image in evaluation."""
    height, width = 10 * size[0], 10 * size[1]
    transform = TwoViewResizedCrop(size, None)
    np.random.seed(0)
    boxes = [transform._draw_crop(width, height) for _ in range(200)]
    stretch = [(w / size[1]) / (h / size[0]) for _, _, w, h in boxes]
    assert 0.7 < min(stretch) < 0.8 < 1.25 < max(stretch) < 1.4  # 3/4 to 4/3, rounded to pixels
    assert transform._central_crop(width, height) == (0, 0, width, height)
    assert transform.ratio == (3 / 4, 4 / 3) or size[0] != size[1]


def test_default_interpolations_are_bicubic_and_lanczos(photo):
    """As in the official code's ``interpolation`` and ``second_interpolation``."""
    views = crop_at(TwoViewResizedCrop(48, 24), (5, 6, 70, 60))(dict(img=photo))['img']
    image = Image.fromarray(photo)
    for view, size, how in zip(
        views, (48, 24), (InterpolationMode.BICUBIC, InterpolationMode.LANCZOS), strict=True
    ):
        theirs = TF.resized_crop(image, 6, 5, 60, 70, [size, size], how)
        np.testing.assert_allclose(view, np.asarray(theirs), atol=1)


def test_shrinking_is_antialiased():
    """A 1-pixel checkerboard becomes flat gray; taking single pixels would leave it black."""
    board = np.indices((128, 128)).sum(0) % 2 * 255
    board = np.repeat(board[..., None], 3, axis=2).astype(np.uint8)
    transform = crop_at(TwoViewResizedCrop(32, 16), (0, 0, 128, 128))
    for view in transform(dict(img=board))['img']:
        inner = view[2:-2, 2:-2].astype(int)  # at the border filters are cut off
        assert (np.abs(inner - 127.5) < 3).all()
    assert board[::4, ::4].max() == 0


def draw_boxes(width, height, count=2000, **options):
    transform = TwoViewResizedCrop(8, 4, **options)
    return np.array([transform._draw_crop(width, height) for _ in range(count)])


def test_crops_have_area_and_aspect_within_the_ranges():
    """Up to rounding of the sides, by 0.5 pixels each."""
    np.random.seed(0)
    left, top, w, h = draw_boxes(400, 300, scale=(0.2, 0.6), ratio=(0.5, 1.5)).T
    assert (((w + 0.5) * (h + 0.5)) / 120_000 >= 0.2).all()
    assert (((w - 0.5) * (h - 0.5)) / 120_000 <= 0.6).all()
    assert ((w + 0.5) / (h - 0.5) >= 0.5).all()
    assert ((w - 0.5) / (h + 0.5) <= 1.5).all()
    area, ratio = w * h / 120_000, w / h
    assert area.min() < 0.21
    assert area.max() > 0.59
    assert ratio.min() < 0.52
    assert ratio.max() > 1.45
    assert (left >= 0).all() and (left + w <= 400).all()
    assert (top >= 0).all() and (top + h <= 300).all()


@pytest.mark.parametrize(('width', 'height'), [(400, 300), (100, 220)])
def test_crops_are_distributed_as_torchvisions(width, height):
    np.random.seed(0)
    torch.manual_seed(0)
    ours = draw_boxes(width, height)
    image = Image.new('L', (width, height))
    params = [RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(2000)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in params])

    def statistics(boxes):
        left, top, w, h = boxes.T.astype(float)
        return np.stack([left, top, w * h, np.log(w / h), left**2, top**2, (w * h) ** 2])

    a, b = statistics(ours), statistics(theirs)
    sigma = np.sqrt(a.var(1) / a.shape[1] + b.var(1) / b.shape[1])
    assert (np.abs(a.mean(1) - b.mean(1)) < 4 * sigma).all()


def test_every_corner_can_be_reached():
    np.random.seed(0)
    left, top, w, h = draw_boxes(40, 30).T
    for corner in (
        (left == 0) & (top == 0),
        (left + w == 40) & (top == 0),
        (left == 0) & (top + h == 30),
        (left + w == 40) & (top + h == 30),
    ):
        assert corner.sum() > 20


@pytest.mark.parametrize(
    ('width', 'height', 'box'),
    [
        (1000, 10, (493, 0, 13, 10)),  # 10 * 4/3 = 13.3
        (10, 1000, (0, 493, 10, 13)),  # 10 / (3/4) = 13.3
        (1000, 1, (499, 0, 1, 1)),
        (1, 1, (0, 0, 1, 1)),
    ],
)
def test_extreme_images_give_the_largest_central_crop(width, height, box):
    """As torchvision's fallback after ten tries."""
    np.random.seed(0)
    boxes = {tuple(map(int, b)) for b in draw_boxes(width, height, 20)}
    assert boxes == {box}
    image = Image.new('L', (width, height))
    top, left, h, w = RandomResizedCrop.get_params(image, SCALE, RATIO)
    assert (left, top, w, h) == box
    views = TwoViewResizedCrop(16, 8)(dict(img=np.full((height, width, 3), 9, np.uint8)))['img']
    assert all((view == 9).all() for view in views)


def test_fallback_where_no_area_fits():
    """A ratio that the image lacks: the fallback keeps within it, after ten draws of two."""
    np.random.seed(0)
    boxes = draw_boxes(100, 100, 20, scale=(1.0, 1.0), ratio=(2.0, 2.0))
    assert {tuple(map(int, box)) for box in boxes} == {(0, 25, 100, 50)}
    next_draw = np.random.random()
    np.random.seed(0)
    assert np.random.random(20 * 10 * 2 + 1)[-1] == next_draw


@pytest.mark.parametrize(
    ('size', 'second_size', 'shapes'),
    [
        (64, 32, [(64, 64, 3), (32, 32, 3)]),
        ((48, 96), (24, 48), [(48, 96, 3), (24, 48, 3)]),
        ([48, 96], 8, [(48, 96, 3), (8, 8, 3)]),  # lists, as configs have them
        (64, None, [(64, 64, 3)]),
    ],
)
def test_sizes_are_height_and_width(photo, size, second_size, shapes):
    results = TwoViewResizedCrop(size, second_size)(dict(img=photo, ori_shape=(90, 120)))
    assert [view.shape for view in results['img']] == shapes
    assert all(view.dtype == np.uint8 for view in results['img'])
    assert results['img_shape'] == shapes[0][:2]
    assert results['ori_shape'] == (90, 120)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(interpolation='area'), "Unknown interpolation 'area': choose one of .*'lanczos'"),
        (dict(second_interpolation='cubic'), "Unknown interpolation 'cubic': choose one of"),
        (dict(scale=(0, 1)), r'scale must be \(low, high\) with 0 < low <= high'),
        (dict(scale=(1.0, 0.08)), r'scale must be \(low, high\)'),
        (dict(ratio=(4 / 3, 3 / 4)), r'ratio must be \(low, high\)'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        TwoViewResizedCrop(**options)


def test_repr_names_the_options():
    text = repr(TwoViewResizedCrop((64, 32), None, scale=(0.5, 1.0)))
    assert text.startswith('TwoViewResizedCrop(')
    assert '(64, 32)' in text
    assert 'scale=(0.5, 1.0)' in text


def test_pipeline_of_the_configs(tmp_path):
    """From files to a collated batch, as in configs/_base_/datasets/in1k_two-view_224.py."""
    pipeline = Compose(
        [
            dict(type='cae_mm.LoadImage'),
            dict(
                type='cae_mm.TwoViewResizedCrop',
                size=(96, 160),
                second_size=(48, 80),
                flip_prob=0.5,
            ),
            dict(type='cae_mm.CAEMaskGenerator', patch_size=16, mask_ratio=0.5),
            dict(type='mmpretrain.PackInputs'),
        ]
    )
    np.random.seed(0)
    colours = [(250, 120, 10), (10, 20, 30), (0, 255, 0)]  # RGB
    for i, colour in enumerate(colours):
        Image.new('RGB', (70 + i, 50), colour).save(tmp_path / f'{i}.png')
    samples = [pipeline(dict(img_path=str(tmp_path / f'{i}.png'))) for i in range(3)]
    batch = default_collate(samples)

    view1, view2 = batch['inputs']
    assert view1.dtype == view2.dtype == torch.uint8
    assert view1.shape == (3, 3, 96, 160)
    assert view2.shape == (3, 3, 48, 80)
    for image1, image2, colour in zip(view1, view2, colours, strict=True):
        bgr = torch.tensor(colour[::-1], dtype=torch.uint8).view(3, 1, 1)
        assert (image1 == bgr).all()
        assert (image2 == bgr).all()
    for i, sample in enumerate(batch['data_samples']):
        assert sample.mask.dtype == torch.bool
        assert sample.mask.shape == (6, 10)
        assert sample.mask.sum() == 30
        assert sample.img_path.endswith(f'{i}.png')
        assert sample.img_shape == (96, 160)
        assert sample.ori_shape == (50, 70 + i)
    assert (batch['data_samples'][0].mask != batch['data_samples'][1].mask).any()


@pytest.mark.parametrize('prob', [0.3, 1.0])
def test_flip_prob_is_random_flip_before_the_crop(photo, prob):
    """Same seed, same flips, same crops: the transform took over from mmpretrain's RandomFlip."""
    before = Compose([dict(type='mmpretrain.RandomFlip', prob=prob)])
    for seed in range(10):
        np.random.seed(seed)
        expected = TwoViewResizedCrop(32, 16)(before(dict(img=photo)))['img']
        np.random.seed(seed)
        views = TwoViewResizedCrop(32, 16, flip_prob=prob)(dict(img=photo))['img']
        for got, other in zip(views, expected, strict=True):
            np.testing.assert_array_equal(got, other)


def test_views_are_packed_without_a_copy(photo):
    """They lie in memory as batches need them."""
    results = TwoViewResizedCrop(32, 16)(dict(img=photo[..., ::-1]))
    views = results['img']
    packed = Compose([dict(type='mmpretrain.PackInputs')])(results)['inputs']
    for view, tensor in zip(views, packed, strict=True):
        assert np.shares_memory(view, tensor.numpy())


def test_views_can_be_written_into(photo):
    """Torch warns of arrays that cannot, and transforms that work in place fail."""
    views = TwoViewResizedCrop(64, 32)(dict(img=photo))['img']
    assert all(view.flags.writeable for view in views)


def test_square_is_as_likely_wide_as_tall():
    """The aspect is uniform in its logarithm, not in itself."""
    np.random.seed(0)
    _, _, w, h = draw_boxes(300, 300, scale=(0.1, 0.5)).T
    log_ratio = np.log(w / h)
    sigma = math.log(4 / 3) / math.sqrt(3 * len(log_ratio))
    assert abs(log_ratio.mean()) < 5 * sigma


@pytest.mark.parametrize(
    ('ratio', 'box'), [((1.0, 1.0), (10, 0, 40, 40)), ((0.5, 2.0), (0, 0, 60, 40))]
)
def test_central_crop_is_the_largest_within_the_ratios(ratio, box):
    transform = TwoViewResizedCrop(8, 4, ratio=ratio, central=True)
    image = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
    left, top, width, height = box
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    first, second = transform(dict(img=image))['img']
    for view, side, how in ((first, 8, 'BICUBIC'), (second, 4, 'LANCZOS')):
        theirs = crop.resize((side, side), Image.Resampling[how])
        np.testing.assert_allclose(view, np.asarray(theirs), atol=1)


def test_map_of_another_size_than_its_image_is_named():
    sample = dict(img_path='a.jpg', seg_map_path='a.png', ori_shape=(6, 8))
    check = TRANSFORMS.build(dict(type='cae_mm.CheckSegMap'))
    assert check(sample) is sample  # of inference, which loads none
    sample['gt_seg_map'] = np.zeros((6, 8), np.uint8)
    sample['img'] = np.zeros((3, 4, 3), np.uint8)  # resized before the map is loaded
    assert check(sample) is sample
    assert check(sample | dict(ori_shape=(6, 8, 3)))  # as mmsegmentation's mosaics have it
    for shape in ((8, 6), (6, 8, 3), (3, 4)):
        sample['gt_seg_map'] = np.zeros(shape, np.uint8)
        message = f'a.png has shape {shape}, its image a.jpg (6, 8) (height, width'
        with pytest.raises(ValueError, match=re.escape(message)):
            check(sample)
