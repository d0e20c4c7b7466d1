"""tools/make_shards.py: nothing is lost, nothing is mixed up, a stop costs one shard."""

import tarfile

import pytest
from builders import make_images, run_tool
from PIL import Image

from cae_mm.datasets.shard_index import INDEX_FILE, load_index, scan_shard

SIZE = ('--shard-mb', 0.005)  # three or four of these images


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('folder'), dict(ant=100, bee=256), 6)


def contents(out):
    """Bytes by file; names of images by shard."""
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.name != INDEX_FILE}
    shards = sorted(out.glob('*.tar'))
    return files, [[image.name for image in scan_shard(shard).images] for shard in shards]


def test_shards_depend_on_images_and_seed_only(folder, tmp_path, capsys):
    for name, seed in dict(one=0, same=0, other=1).items():
        run_tool('make_shards.py', folder, tmp_path / name, *SIZE, '--seed', seed)
    files, shards = contents(tmp_path / 'one')
    assert files == contents(tmp_path / 'same')[0] != contents(tmp_path / 'other')[0]
    names = [name for shard in shards for name in shard]
    wanted = sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*.png'))
    assert sorted(names) == wanted != names  # classes do not lie side by side
    sizes = [scan_shard(path).images for path in sorted((tmp_path / 'one').glob('*.tar'))]
    assert all(sum(image.size for image in images) <= 5000 for images in sizes)
    assert len(shards) > 2
    out = capsys.readouterr().out
    assert f'12 images (1.79e-05 GB, 2 classes) in {len(shards)} shards' in out
    assert f'settings.shards={tmp_path / "one"}' in out


def test_names_become_keys_of_their_own(tmp_path):
    """What webdataset would take for one sample, or for an ending, and what is no image."""
    source = tmp_path / 'source'
    (source / 'a.b').mkdir(parents=True)
    names = ['x.png', 'x.JPG', 'x.1.png', 'x_1.png', 'a.b/x.png', 'ä ö.webp']
    for name in names:
        Image.new('RGB', (4, 4)).save(source / name)
    for name in ('notes.txt', '.hidden.png'):
        (source / name).write_text('no image')
    run_tool('make_shards.py', source, tmp_path / 'out')
    with tarfile.open(tmp_path / 'out/000000.tar') as tar:  # no .cls: images without a class
        members = sorted(tar.getnames())
    assert members == ['a.b/x.png', 'x.jpg', 'x_1.png', 'x_1_2.png', 'x_2.png', 'ä ö.webp']
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'000000.tar', INDEX_FILE}


def test_stopped_run_goes_on(folder, tmp_path):
    run_tool('make_shards.py', folder, tmp_path, *SIZE)
    files, shards = contents(tmp_path)
    kept = tmp_path / '000000.tar'
    before = kept.stat()
    for path in list(tmp_path.iterdir()):
        if path != kept:
            path.unlink()
    (tmp_path / '000001.tmp').write_bytes(files['000001.tar'][:3000])
    run_tool('make_shards.py', folder, tmp_path, *SIZE)
    assert contents(tmp_path) == (files, shards)
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert len(load_index(tmp_path).images) == 12


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ((*SIZE, '--seed', 1), '000000.tar has other images than those of this run'),
        ((), '000001.tar, not of this run: name another folder'),  # all in one shard
    ],
)
def test_other_shards_are_not_touched(folder, tmp_path, options, message):
    run_tool('make_shards.py', folder, tmp_path, *SIZE)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=message):
        run_tool('make_shards.py', folder, tmp_path, *options)
    assert contents(tmp_path) == before


def test_folders_that_are_not_right(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=f'no folder at {tmp_path}/absent'):
        run_tool('make_shards.py', tmp_path / 'absent', tmp_path / 'out')
    with pytest.raises(RuntimeError, match='Found 0 files'):
        run_tool('make_shards.py', tmp_path, tmp_path / 'out')
    (tmp_path / 'mine.txt').touch()
    with pytest.raises(FileExistsError, match=f'{tmp_path} has mine.txt, not of this run'):
        run_tool('make_shards.py', folder, tmp_path)


def test_image_that_changes_meanwhile_is_an_error(folder, tmp_path, monkeypatch):
    monkeypatch.setattr('pathlib.Path.read_bytes', lambda path: b'other')
    with pytest.raises(RuntimeError, match='000000.tmp has not what was to be written'):
        run_tool('make_shards.py', folder, tmp_path, *SIZE)
    assert not list(tmp_path.glob('*.tar'))
