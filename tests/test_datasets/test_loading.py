"""Files of every kind: right colours, right size, upright; broken ones are named."""

import logging
import os
import resource
import stat

import mmpretrain.datasets  # noqa: F401  registers CustomDataset
import numpy as np
import pytest
from bad_files import UNREADABLE, huge_jpeg, jpeg_frame, jpeg_segment, noise, write_unreadable
from mmengine.dataset import Compose
from mmengine.registry import DATASETS
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import decode_jpeg

import cae_mm.registry  # noqa: F401
from cae_mm.datasets import LoadImage, loading

RAMP = np.linspace(0, 1, 12).reshape(3, 4)  # dark to light
GRAY = (RAMP * 255).astype(np.uint8)
# upper half red, lower half blue, so that channels and rows can be told apart
COLOURS = np.array([[[230, 20, 30]] * 6] * 2 + [[[10, 40, 240]] * 6] * 2, dtype=np.uint8)


def load(path, **options):
    """Load a file, check what holds for all, and return RGB."""
    results = LoadImage(**options)(dict(img_path=str(path)))
    image = results['img']
    assert image.dtype == np.uint8
    assert image.shape == (*results['img_shape'], 3)
    assert results['img_shape'] == results['ori_shape']
    assert results['img_path'] == str(path)
    return image[..., ::-1]  # OpenMMLab's images are BGR


def save(image, path, **options):
    image.save(path, **options)
    return path


def gray(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=2)


@pytest.mark.parametrize('name', ['a.png', 'a.bmp', 'a.ppm', 'a.tif', 'a.webp'])
def test_rgb_without_loss(tmp_path, name):
    options = dict(lossless=True) if name.endswith('webp') else {}
    path = save(Image.fromarray(COLOURS), tmp_path / name, **options)
    np.testing.assert_array_equal(load(path), COLOURS)


def test_images_are_bgr(tmp_path):
    path = save(Image.new('RGB', (5, 3), (1, 2, 3)), tmp_path / 'a.png')
    image = LoadImage()(dict(img_path=str(path)))['img']
    assert (image == [3, 2, 1]).all()
    assert image.shape == (3, 5, 3)


@pytest.mark.parametrize('options', [{}, dict(progressive=True)])
def test_rgb_jpeg(tmp_path, options):
    pixels = COLOURS.repeat(8, 0).repeat(8, 1)  # blocks of JPEG are 8x8
    path = save(Image.fromarray(pixels), tmp_path / 'a.jpg', quality=95, subsampling=0, **options)
    assert np.abs(load(path).astype(int) - pixels).max() <= 4


@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.tif'])
def test_grayscale(tmp_path, name):
    pixels = GRAY.repeat(8, 0).repeat(8, 1)
    path = save(Image.fromarray(pixels), tmp_path / name)
    assert np.abs(load(path).astype(int) - gray(pixels)).max() <= (1 if name == 'a.jpg' else 0)


def test_alpha_is_dropped(tmp_path):
    """Colours stay as stored, they are neither blended nor blackened."""
    alpha = np.full((*COLOURS.shape[:2], 1), 128, dtype=np.uint8)
    path = save(Image.fromarray(np.concatenate([COLOURS, alpha], 2)), tmp_path / 'rgba.png')
    np.testing.assert_array_equal(load(path), COLOURS)
    la = Image.merge('LA', [Image.fromarray(GRAY), Image.new('L', (4, 3), 7)])
    np.testing.assert_array_equal(load(save(la, tmp_path / 'la.png')), gray(GRAY))


@pytest.mark.filterwarnings('ignore:Palette images with Transparency')  # Pillow's advice
@pytest.mark.parametrize('options', [{}, dict(transparency=0), dict(transparency=b'\x00\x80')])
def test_palette(tmp_path, options):
    palette = Image.fromarray(COLOURS).quantize(2)
    assert palette.mode == 'P'
    path = save(palette, tmp_path / 'a.png', **options)
    np.testing.assert_array_equal(load(path), COLOURS)
    if not options:
        np.testing.assert_array_equal(load(save(palette, tmp_path / 'a.gif')), COLOURS)


def test_cmyk(tmp_path):
    """Cyan, magenta, yellow and key; full magenta and yellow is red."""
    cmyk = Image.new('CMYK', (16, 8), (0, 255, 255, 0))
    for name in ('a.tif', 'a.jpg'):
        pixels = load(save(cmyk, tmp_path / name)).astype(int)
        assert pixels.shape == (8, 16, 3)
        assert np.abs(pixels - [255, 0, 0]).max() <= 3


def test_one_bit(tmp_path):
    bits = RAMP > 0.5
    for name in ('a.png', 'a.tif'):
        path = save(Image.fromarray(bits), tmp_path / name)
        np.testing.assert_array_equal(load(path), gray(bits * 255))


@pytest.mark.parametrize('name', ['a.png', 'a.tif'])
@pytest.mark.parametrize('dtype', ['<u2', '>u2'])
def test_16_bits_are_scaled_not_clipped(tmp_path, name, dtype):
    """Clipped, all but the darkest 1/256 of the range would be white."""
    path = save(Image.fromarray((RAMP * 65535).astype(dtype)), tmp_path / name)
    with Image.open(path) as image:
        assert image.mode.startswith('I;16')
    np.testing.assert_allclose(load(path), gray(RAMP * 255), atol=1)
    assert load(path).max() == 255


@pytest.mark.parametrize('channels', [3, 4])
def test_16_bit_colours(tmp_path, channels):
    cv2 = pytest.importorskip('cv2')
    rgb = np.array([60000, 30000, 1000, 65535][:channels], dtype=np.uint16)
    bgr = rgb[[2, 1, 0, 3][:channels]]
    path = str(tmp_path / 'a.png')
    assert cv2.imwrite(path, np.tile(bgr, (3, 4, 1)))
    np.testing.assert_allclose(load(path), np.tile(rgb[:3] / 257, (3, 4, 1)), atol=1)


@pytest.mark.parametrize('dtype', [np.int32, np.float32])
def test_values_without_a_fixed_range_are_refused(tmp_path, dtype):
    """Is 1 black or white in them? Pillow would cut floats off at 0 and 255."""
    path = save(Image.fromarray((RAMP * 255).astype(dtype)), tmp_path / 'a.tif')
    with pytest.raises(OSError, match='a.tif: float and 32-bit images have no fixed range'):
        load(path)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('mode', ['RGB', 'I;16'])
def test_exif_orientation(tmp_path, orientation, mode):
    """All eight, as Pillow turns them; 5 to 8 swap height and width."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    if mode == 'RGB':
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
        path = save(image, tmp_path / 'a.jpg', exif=exif, quality=90)
    else:
        image = Image.fromarray((np.arange(384).reshape(16, 24) * 170).astype(np.uint16))
        path = save(image, tmp_path / 'a.png', exif=exif)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
        stored = np.asarray(image)
    assert upright.shape[:2] == ((24, 16) if orientation >= 5 else (16, 24))
    pixels = load(path)
    if mode == 'RGB':
        np.testing.assert_array_equal(pixels, upright)
    else:
        np.testing.assert_array_equal(pixels, gray(upright // 257))
        stored = gray(stored // 257)
    unchanged = pixels.shape == stored.shape and (pixels == stored).all()
    assert unchanged == (orientation == 1)


def save_jpeg(kind, path):
    """A JPEG of some kind, of noise, so that any difference in decoding shows."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == 'rotated' else 1
    if kind in ('gray', 'cmyk'):
        image = image.convert(dict(gray='L', cmyk='CMYK')[kind])
    options = dict(progressive=kind == 'progressive', subsampling=0 if kind == '4:4:4' else 2)
    return save(image, path, **options, **(dict(exif=exif) if kind in ('exif', 'rotated') else {}))


@pytest.mark.parametrize(
    ('kind', 'fast'),
    [
        ('4:2:0', True),
        ('4:4:4', True),
        ('progressive', True),
        ('exif', True),
        ('rotated', False),
        ('gray', False),
        ('cmyk', False),
    ],
)
def test_jpegs_are_decoded_by_torchvision_with_pillows_pixels(tmp_path, monkeypatch, kind, fast):
    calls = []
    monkeypatch.setattr(loading, 'decode_jpeg', lambda x: calls.append(x) or decode_jpeg(x))
    path = save_jpeg(kind, tmp_path / 'a.jpg')
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
    np.testing.assert_array_equal(load(path), upright)
    assert len(calls) == fast


def test_large_jpegs_are_left_to_pillow(tmp_path, monkeypatch):
    """Whose limit protects from bombs."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 900)
    path = save_jpeg('4:2:0', tmp_path / 'a.jpg')  # 1850 pixels
    with pytest.raises(OSError, match=rf'{path}: Image size \(1850 pixels\) exceeds limit'):
        load(path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)  # how users switch it off
    assert load(path).shape == (37, 50, 3)


def test_pillow_decides_about_what_torchvision_refuses(tmp_path, monkeypatch):
    path = save_jpeg('4:2:0', tmp_path / 'a.jpg')
    expected = load(path)

    def refuse(content):
        raise RuntimeError('no')

    monkeypatch.setattr(loading, 'decode_jpeg', refuse)
    np.testing.assert_array_equal(load(path), expected)


@pytest.mark.parametrize('size', [2, 5, 30])
def test_a_cut_header_is_pillows_to_report(tmp_path, size):
    path = save_jpeg('4:2:0', tmp_path / 'a.jpg')
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(OSError) as ours:
        load(path)
    with pytest.raises(Exception) as pillows:
        Image.open(path)
    unknown = isinstance(pillows.value, UnidentifiedImageError)
    assert ('no image file' if unknown else str(pillows.value)) in str(ours.value)


def test_image_can_be_written_into(tmp_path):
    """As with mmcv's loader: transforms such as RandomErasing work in place."""
    path = save(Image.fromarray(COLOURS), tmp_path / 'a.png')
    image = LoadImage()(dict(img_path=str(path)))['img']
    assert image.flags.writeable


def test_loaded_image_can_be_packed(tmp_path):
    """The image is a view with negative strides, which torch cannot take as it is."""
    pipeline = Compose([dict(type='cae_mm.LoadImage'), dict(type='mmpretrain.PackInputs')])
    path = save(Image.fromarray(COLOURS), tmp_path / 'a.png')
    image = pipeline(dict(img_path=str(path)))['inputs']
    np.testing.assert_array_equal(image.numpy(), COLOURS[..., ::-1].transpose(2, 0, 1))


def write_good(path, shade=200):
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(Image.new('RGB', (8, 6), (shade, 0, 0)), path)


def test_bytes_are_read_instead_of_the_file(tmp_path):
    """Of a dataset that has the content already; the path is a name only."""
    content = write_good(tmp_path / 'a.png', 123).read_bytes()
    name = str(tmp_path / 'shard.tar' / 'a.png')
    results = LoadImage()(dict(img_path=name, img_bytes=content))
    assert (results['img'] == [0, 0, 123]).all()
    assert results['img_path'] == name
    assert 'img_bytes' not in results
    with pytest.raises(OSError, match=f'cannot read the image {name}: the file is empty'):
        LoadImage()(dict(img_path=name, img_bytes=b''))


@pytest.mark.parametrize('kind', UNREADABLE)
def test_broken_file_raises_with_its_path_and_the_reason(tmp_path, kind):
    path = write_unreadable(kind, tmp_path)
    way_out = 'Fix or remove the file, or set settings.transforms.LoadImage.on_error=skip'
    reason = UNREADABLE[kind][2]
    with pytest.raises(OSError, match=rf'cannot read the image {path}: ({reason}).*\. {way_out}'):
        load(path)


def test_bomb_raises_with_its_path(tmp_path, monkeypatch):
    """Pillow refuses images of more than twice this many pixels."""
    path = write_good(tmp_path / 'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 20)
    with pytest.raises(OSError, match=rf'cannot read the image {path}: Image size \(48 pixels\)'):
        load(path)


def test_other_errors_are_not_swallowed(tmp_path):
    with pytest.raises(KeyError, match='img_path'):
        LoadImage(on_error='skip')({})


@pytest.mark.parametrize('kind', ['zero-byte', 'truncated-jpeg', 'bad-chunk', 'vanished'])
def test_broken_file_is_skipped_with_its_path_in_the_log(tmp_path, kind, log):
    path = write_unreadable(kind, tmp_path)
    assert LoadImage(on_error='skip')(dict(img_path=str(path))) is None
    [record] = log.records
    assert record.levelno == logging.WARNING
    assert f'cannot read the image {path}: ' in record.getMessage()
    assert record.getMessage().endswith('. Skipped')


def test_unknown_on_error():
    with pytest.raises(ValueError, match="Unknown on_error 'ignore': choose 'raise' or 'skip'"):
        LoadImage(on_error='ignore')


def test_repr_names_the_option():
    assert repr(LoadImage('skip')) == "LoadImage(on_error='skip')"


def dataset(root, on_error='raise', **options):
    options = dict(type='mmpretrain.CustomDataset', data_root=str(root)) | options
    pipeline = [dict(type='cae_mm.LoadImage', on_error=on_error)]
    return DATASETS.build(options | dict(pipeline=pipeline))


def shades(data):
    return sorted(int(sample['img'][0, 0, 2]) for sample in data)


def test_dataset_yields_only_good_images(tmp_path):
    write_unreadable('text', tmp_path)
    for shade in (10, 20, 30):
        write_good(tmp_path / f'{shade}.png', shade)
    data = dataset(tmp_path, 'skip', with_label=False)
    assert len(data) == 4
    np.random.seed(0)
    for _ in range(5):
        assert set(shades(data[i] for i in range(4))) == {10, 20, 30}


def test_dataset_stops_at_a_broken_file(tmp_path):
    path = write_unreadable('text', tmp_path)
    data = dataset(tmp_path, with_label=False)
    with pytest.raises(OSError, match=f'cannot read the image {path}'):
        data[0]


def test_dataset_of_broken_files_ends(tmp_path):
    for kind in ('text', 'bad-chunk'):
        write_unreadable(kind, tmp_path)
    data = dataset(tmp_path, 'skip', with_label=False, max_refetch=5)
    with pytest.raises(Exception, match='Cannot find valid image after 5!'):
        data[0]


def test_labelled_folders(tmp_path):
    for label, name in enumerate(['ant', 'bee']):
        for i in range(2):
            write_good(tmp_path / name / f'{i}.png', 100 * label + i)
    data = dataset(tmp_path)
    assert data.metainfo['classes'] == ('ant', 'bee')
    assert [sample['gt_label'] for sample in data] == [0, 0, 1, 1]
    assert [int(sample['img'][0, 0, 2]) for sample in data] == [0, 1, 100, 101]


def test_flat_folder_without_labels(tmp_path):
    for shade in (1, 2, 3):
        write_good(tmp_path / f'{shade}.png', shade)
    (tmp_path / 'notes.txt').write_text('not an image')
    data = dataset(tmp_path, with_label=False)
    assert shades(data) == [1, 2, 3]
    assert 'gt_label' not in data[0]


def test_nested_folders_without_labels(tmp_path):
    for shade, place in enumerate(['a.png', 'x/b.png', 'x/y/z/c.PNG']):
        write_good(tmp_path / place, shade)
    assert shades(dataset(tmp_path, with_label=False)) == [0, 1, 2]


def test_file_list(tmp_path):
    """Only what is listed, in this order; blanks in names are fine."""
    for shade, place in enumerate(['train/a.png', 'train/b c.png', 'train/unlisted.png']):
        write_good(tmp_path / place, shade)
    (tmp_path / 'list.txt').write_text('b c.png\na.png\n')
    data = dataset(tmp_path, with_label=False, ann_file='list.txt', data_prefix='train')
    assert [int(sample['img'][0, 0, 2]) for sample in data] == [1, 0]
    (tmp_path / 'labels.txt').write_text('b c.png 1\na.png 0\n')
    labelled = dataset(
        tmp_path, ann_file='labels.txt', data_prefix='train', metainfo=dict(classes=('x', 'y'))
    )
    assert [sample['gt_label'] for sample in labelled] == [1, 0]


def test_image_that_was_read_already_stays():
    image = np.zeros((2, 3, 3), np.uint8)
    assert LoadImage()(dict(img=image, img_shape=(2, 3)))['img'] is image


SMALL = jpeg_frame(0xC0, 8, 8)


@pytest.mark.parametrize(
    'options',
    [
        # padding, which is allowed before each segment: 0xFFE0EA, read from it on, is a length
        dict(before=b'\xff' + jpeg_segment(0xE0, bytes(57575) + SMALL + bytes(2404))),
        # a restart has no length, 0xFFE0 is taken for it
        dict(before=b'\xff\xd0' + jpeg_segment(0xE0, bytes(65500) + SMALL)),
        # a frame of arithmetic coding, and one that comes too late to count
        dict(kind=0xCA, behind=jpeg_segment(0xDA, bytes(10)) + SMALL),
    ],
)
def test_no_header_hides_the_size_of_a_bomb(tmp_path, monkeypatch, options):
    """Torchvision would allocate 10 GB for what libjpeg-turbo finds in these."""
    monkeypatch.setattr(loading, 'decode_jpeg', lambda x: pytest.fail('torchvision gets it'))
    huge_jpeg(tmp_path / 'a.jpg', **options)
    with pytest.raises(OSError, match=r'Image size \(3600000000 pixels\) exceeds limit'):
        load(tmp_path / 'a.jpg')


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB


def test_files_larger_than_memory_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, 'MAX_BYTES', 2**20)
    with (tmp_path / 'a.jpg').open('wb') as file:
        file.truncate(2**40)  # takes no place on the disk
    before = peak()
    message = r'a.jpg: the file has 1099511627776 bytes, the limit is 1048576'
    with pytest.raises(OSError, match=message):
        load(tmp_path / 'a.jpg')
    assert peak() - before < 2**14


@pytest.mark.parametrize('name', ['a.webp', 'a.png', 'a.tif', 'a.gif'])
def test_animated_images_are_their_first_picture(tmp_path, name):
    pictures = [Image.new('RGB', (8, 6), colour) for colour in ('red', 'lime', 'blue')]
    options = dict(lossless=True) if name.endswith('webp') else {}
    path = tmp_path / name
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)
    with Image.open(path) as image:
        assert image.n_frames == 3
    np.testing.assert_array_equal(load(path), np.full((6, 8, 3), [255, 0, 0]))


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')  # Pillow's, which training shows
@pytest.mark.parametrize(
    'data', [b'Exif\0\0garbage', b'Exif\0\0II*\0\xff\xff\xff\x7f', b'Exif\0\0']
)
def test_images_with_broken_exif_are_taken_as_stored(tmp_path, data):
    path = tmp_path / 'a.jpg'
    noise(24, 16).save(path)
    pixels = load(path)
    content = path.read_bytes()
    path.write_bytes(content[:2] + jpeg_segment(0xE1, data) + content[2:])
    np.testing.assert_array_equal(load(path), pixels)


def test_images_of_one_pixel_go_through_pretraining(tmp_path):
    path = save(Image.new('RGB', (1, 1), (200, 100, 50)), tmp_path / 'a.png')
    pipeline = Compose(
        [
            dict(type='cae_mm.LoadImage'),
            dict(type='cae_mm.TwoViewResizedCrop', size=32, second_size=16, flip_prob=0.5),
            dict(type='cae_mm.CAEMaskGenerator', patch_size=8, min_block=2),
            dict(type='mmpretrain.PackInputs'),
        ]
    )
    first, second = pipeline(dict(img_path=str(path)))['inputs']
    assert first.shape == (3, 32, 32) and second.shape == (3, 16, 16)
    for view in (first, second):
        assert (view.flatten(1).T.numpy() == [50, 100, 200]).all()


def test_file_without_permission(tmp_path):
    path = write_good(tmp_path / 'a.png')
    path.chmod(stat.S_IWUSR)
    user = os.geteuid()
    if not user:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(OSError, match=f'cannot read the image {path}: Permission denied'):
            load(path)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize('name', [b'caf\xe9.png', 'ä ö\t.png'.encode(), b'x' * 251 + b'.png'])
def test_odd_names(tmp_path, name, log):
    """Bytes that are not UTF-8 come as surrogates, which a log's encoding refuses."""
    path = os.fsencode(tmp_path) + b'/' + name
    write_good(tmp_path / 'a.png', 77)
    os.rename(tmp_path / 'a.png', path)
    [sample] = dataset(tmp_path, with_label=False)
    assert sample['img'][0, 0, 2] == 77
    assert os.fsencode(sample['img_path']) == path
    os.truncate(path, 9)
    data = dataset(tmp_path, 'skip', with_label=False, max_refetch=0)
    with pytest.raises(Exception, match='Cannot find valid image'):
        data[0]
    log.records[-1].getMessage().encode()
