"""The list of unreadable images: each once, whoever writes, whatever its name."""

import multiprocessing
import os

import pytest

from cae_mm.datasets.unreadable import Unreadable, UnreadableList

NAMES = [
    '/a/b c.png',
    '/a/ä.png',
    '/a/tab\t.png',
    '/a/new\nline.png',
    '"/a',
    '/a/\udce9.png',
    'a\\n',
]


def read(path):
    """Paths, by a reader of its own."""
    images = UnreadableList(path)
    images.add()
    return images.known


def test_any_name_comes_back(tmp_path):
    images = UnreadableList(tmp_path / 'a.txt')
    images.add(Unreadable(name, f'reason {i}') for i, name in enumerate(NAMES))
    lines = images.path.read_text().splitlines()
    assert len(lines) == len(NAMES)
    assert lines[0] == '/a/b c.png\treason 0' and lines[1] == '/a/ä.png\treason 1'
    assert read(images.path) == set(NAMES)


def test_each_comes_once(tmp_path):
    one, two = UnreadableList(tmp_path / 'a.txt'), UnreadableList(tmp_path / 'a.txt')
    one.add([Unreadable('a', 'x'), Unreadable('b', 'x'), Unreadable('a', 'y')])
    two.add([Unreadable('b', 'z'), Unreadable('c', 'x')])
    one.add([Unreadable('c', 'x'), Unreadable('d', 'x')])
    lines = [line.split('\t')[0] for line in one.path.read_text().splitlines()]
    assert sorted(lines) == ['a', 'b', 'c', 'd']
    assert one.known == {'a', 'b', 'c', 'd'} and two.known == {'a', 'b', 'c'}
    assert two.end < one.end == one.path.stat().st_size  # from where the next call reads


def test_any_reason_can_be_written(tmp_path):
    """Errors of the system name paths as they are, with bytes that are not UTF-8."""
    images = UnreadableList(tmp_path / 'a.txt')
    images.add([Unreadable('a', 'cannot open \udce9.png')])
    assert images.path.read_text() == 'a\tcannot open \\udce9.png\n'


@pytest.mark.parametrize('size', [1, 5, 7])
def test_what_a_killed_process_left_of_a_line_is_cut_off(tmp_path, size):
    images = UnreadableList(tmp_path / 'a.txt')
    images.add([Unreadable('first', 'x')])
    images.add([Unreadable('second', 'x')])
    os.truncate(images.path, len('first\tx\n') + size)
    again = UnreadableList(images.path)
    again.add([Unreadable('second', 'x'), Unreadable('third', 'x')])
    assert images.path.read_text() == 'first\tx\nsecond\tx\nthird\tx\n'


def write(path, start):
    images = UnreadableList(path)
    start.wait()
    for i in range(500):
        images.add([Unreadable(str(i), 'x')])


def test_many_writers(tmp_path):
    path = tmp_path / 'a.txt'
    context = multiprocessing.get_context('fork')
    start = context.Barrier(4)
    writers = [context.Process(target=write, args=(path, start)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = [line.split('\t')[0] for line in path.read_text().splitlines()]
    assert sorted(map(int, lines)) == list(range(500))
