import pytest
import torch
from builders import make_images
from PIL import Image

from cae_mm.visualization.images import ImageFiles, find_images, to_picture


@pytest.fixture
def folder(tmp_path):
    make_images(tmp_path, dict(a=255, b=255), 3)
    (tmp_path / 'b' / 'notes.txt').write_text('no image')
    return tmp_path


def test_files_and_folders(folder):
    names = [path.relative_to(folder).as_posix() for path in find_images([folder])]
    assert names == ['a/0.png', 'a/1.png', 'a/2.png', 'b/0.png', 'b/1.png', 'b/2.png']
    one = folder / 'b' / '1.png'
    assert find_images([one, folder / 'a']) == [one, *sorted((folder / 'a').iterdir())]


def test_drawn_images_follow_the_seed(folder):
    draws = [find_images([folder], 2, seed) for seed in range(8)]
    assert draws[3] == find_images([folder], 2, 3)
    assert all(len(set(draw)) == 2 for draw in draws) and len({*map(tuple, draws)}) > 3


@pytest.mark.parametrize('name', ['nowhere', 'empty'])
def test_no_images(tmp_path, name):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match=f'{name} is neither an image nor a folder with'):
        find_images([tmp_path / name])


def test_crops_as_pictures(tmp_path):
    Image.new('RGB', (30, 40), (255, 51, 0)).save(tmp_path / 'a.png')
    images = ImageFiles([tmp_path / 'a.png'] * 2, (8, 16))
    assert images.load().shape == (2, 3, 8, 16) and images.load().dtype == torch.uint8
    assert images[1][0][:, 0, 0].tolist() == [0, 51, 255]  # BGR
    picture = to_picture(images.load())
    torch.testing.assert_close(picture[0, :, 4, 4], torch.tensor([1.0, 0.2, 0.0]))
