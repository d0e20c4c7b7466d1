"""tools/check_images.py: each bad image is found, named and survived, whatever it does."""

import faulthandler
import os
import signal
import time

import pytest
from bad_files import LISTED, UNREADABLE, noise, write_unreadable
from builders import make_images, run_tool
from PIL import Image

from cae_mm.datasets import loading


@pytest.fixture
def folder(tmp_path):
    """Images, every kind of file that cannot be read, a copy, and images of odd sizes."""
    folder = make_images(tmp_path / 'images', dict(ant=100, bee=256), 20)
    for kind in LISTED:
        write_unreadable(kind, folder, kind)
    for name, size in {
        'copy': (40, 40),
        'again': (40, 40),
        'line': (400, 33),
        'dot': (1, 1),
    }.items():
        noise(*size[::-1]).save(folder / f'{name}.png')
    return folder


def check(*arguments):
    """Run it with two workers and return the exit status."""
    with pytest.raises(SystemExit) as exit_:
        run_tool('check_images.py', *arguments, '--workers', 2)
    return exit_.value.code


def read_list(path):
    """Reasons by path."""
    lines = path.read_text().splitlines()
    return dict(line.split('\t') for line in lines)


def test_folder(folder, tmp_path, capsys):
    assert check(folder, '--out', tmp_path / 'bad.txt') == 1
    bad = read_list(tmp_path / 'bad.txt')
    names = {f'{folder}/{kind}{UNREADABLE[kind][0]}' for kind in LISTED}
    assert bad.keys() == names and len((tmp_path / 'bad.txt').read_text().splitlines()) == len(
        names
    )
    output = capsys.readouterr()
    for line in (
        f'{44 + len(LISTED)} images in ',
        f'cannot be read: {len(LISTED)}',
        '       1  the file is empty',
        'Image size (N pixels) exceeds limit of N pixels',
        'with a side below 32 pixels: 41',
        f'of sides beyond 1:8: 1\n          {folder}/line.png (400 x 33)',
        'the same file as another: 1',
        f'{tmp_path}/bad.txt names those',
    ):
        assert line in output.out
    assert 'images/s' in output.err  # the bar, with ETA
    for path in list(bad):
        os.unlink(path)
    assert check(folder, '--out', tmp_path / 'bad.txt') == 0
    assert not (tmp_path / 'bad.txt').exists()


def test_list_and_shards(folder, tmp_path):
    (folder / 'list.txt').write_text('ant/1.png\nzero-byte.jpg\ngone.jpg\n')
    assert check(folder, '--list', folder / 'list.txt', '--out', tmp_path / 'bad.txt') == 1
    assert read_list(tmp_path / 'bad.txt') == {
        f'{folder}/gone.jpg': 'No such file or directory',
        f'{folder}/zero-byte.jpg': 'the file is empty',
    }
    run_tool('make_shards.py', folder, tmp_path / 'shards')
    assert check(tmp_path / 'shards', '--out', tmp_path / 'bad.txt') == 1
    bad = read_list(tmp_path / 'bad.txt')
    shard = f'{tmp_path}/shards/000000.tar'
    assert bad.keys() == {f'{shard}/{kind}{UNREADABLE[kind][0]}' for kind in LISTED}


def test_decoder_that_crashes_or_hangs(tmp_path, monkeypatch):
    """Workers are forked, so that the fault that is put in here is in them."""
    folder = make_images(tmp_path / 'images', dict(x=256), 40)
    faults = {i: (folder / f'x/{i}.png').read_bytes() for i in (3, 4, 17, 39)}
    open_image = Image.open

    def fault(file):
        faulthandler.disable()  # pytest's
        content = file.getvalue()
        if content == faults[4]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
        elif content == faults[17]:
            os._exit(5)
        elif content in faults.values():
            os.kill(os.getpid(), signal.SIGSEGV)
        return open_image(file)

    monkeypatch.setattr(loading.Image, 'open', fault)
    assert check(folder, '--seconds', 1, '--out', tmp_path / 'bad.txt') == 1
    assert read_list(tmp_path / 'bad.txt') == {
        f'{folder}/x/3.png': 'the decoder crashed with SIGSEGV',
        f'{folder}/x/4.png': 'it takes more than 1 seconds',
        f'{folder}/x/17.png': 'the decoder crashed with status 5',
        f'{folder}/x/39.png': 'the decoder crashed with SIGSEGV',
    }
