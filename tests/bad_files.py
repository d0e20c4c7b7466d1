"""Files that cannot be read as images, and images that are odd, written for real."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

HUGE = 60_000  # pixels, of each side


def noise(height: int = 64, width: int = 64, seed: int = 0) -> Image.Image:
    """An image that compresses badly, so that it can be cut anywhere."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def png_chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG with its length and checksum."""
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def jpeg_segment(kind: int, data: bytes) -> bytes:
    """A segment of a JPEG with its length."""
    return struct.pack('>BBH', 0xFF, kind, len(data) + 2) + data


def jpeg_frame(kind: int, height: int, width: int) -> bytes:
    """The segment of a JPEG that says its size; three colours."""
    colours = b''.join(bytes([i, 0x11, 0]) for i in (1, 2, 3))
    return jpeg_segment(kind, struct.pack('>BHHB', 8, height, width, 3) + colours)


def cut(image: Image.Image, path: Path, share: float = 0.5) -> None:
    """Save an image and leave that share of its file."""
    image.save(path)
    os.truncate(path, int(path.stat().st_size * share))


def bad_chunk(path: Path) -> None:
    """A PNG with a chunk of no valid name, for which Pillow raises SyntaxError."""
    noise().save(path)
    data = path.read_bytes()
    start = data.index(b'IDAT')
    first, rest = data[start + 4 : start + 9], data[start + 9 :]
    path.write_bytes(data[: start - 4] + png_chunk(b'IDAT', first) + png_chunk(b'?DAT', rest))


def huge_png(path: Path) -> None:
    """A few bytes of a PNG that claims 60,000 x 60,000 pixels."""
    header = png_chunk(b'IHDR', struct.pack('>IIBBBBB', HUGE, HUGE, 8, 2, 0, 0, 0))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + header + png_chunk(b'IDAT', zlib.compress(bytes(9999))))


def huge_jpeg(path: Path, before: bytes = b'', kind: int = 0xC2, behind: bytes = b'') -> None:
    """The beginning of a JPEG of 60,000 x 60,000 pixels, with other segments around its size."""
    scan = jpeg_segment(0xDA, bytes(10))  # without which Pillow 12 takes it for no image
    path.write_bytes(b'\xff\xd8' + before + jpeg_frame(kind, HUGE, HUGE) + behind + scan)


# what cannot be read: how to write it, and what the error says
UNREADABLE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    'zero-byte': ('.jpg', Path.touch, 'the file is empty'),
    'truncated-jpeg': ('.jpg', lambda path: cut(noise(), path), 'image file is truncated'),
    'truncated-png': ('.png', lambda path: cut(noise(), path), 'image file is truncated'),
    'header-only': (
        '.jpg',
        lambda path: cut(noise(), path, 0.005),
        'Truncated File Read',
    ),
    'text': ('.jpg', lambda path: path.write_text('<html>404</html>'), 'no image file'),
    'bad-chunk': ('.png', bad_chunk, 'broken PNG file'),
    'bad-number': ('.ppm', lambda path: path.write_bytes(b'P6 8 x 255 '), 'Non-decimal|invalid'),
    'huge-png': ('.png', huge_png, r'Image size \(3600000000 pixels\) exceeds limit'),
    'huge-jpeg': ('.jpg', huge_jpeg, r'Image size \(3600000000 pixels\) exceeds limit'),
    'float': ('.tif', lambda p: Image.new('F', (8, 8), 0.5).save(p), 'float and 32-bit images'),
    'integers': ('.tif', lambda p: Image.new('I', (8, 8), 7).save(p), 'float and 32-bit images'),
    'folder': ('.jpg', Path.mkdir, 'Is a directory'),
    'pipe': ('.jpg', os.mkfifo, 'a pipe or device, no file'),
    'vanished': ('.jpg', lambda path: None, 'No such file or directory'),
    'link-to-itself': ('.jpg', lambda path: path.symlink_to(path), 'Too many levels of symbolic'),
    'long-name': ('x' * 300 + '.jpg', lambda path: None, 'File name too long'),
}
LISTED = [  # those that a listing of a folder finds
    kind
    for kind in UNREADABLE
    if kind not in ('folder', 'pipe', 'vanished', 'link-to-itself', 'long-name')
]


def write_unreadable(kind: str, folder: Path, name: str = 'bad') -> Path:
    """Write a file of a kind into a folder."""
    ending, write, _ = UNREADABLE[kind]
    path = folder / f'{name}{ending}'
    write(path)
    return path


def make_mixed_folder(folder: Path, count: int, share: float) -> dict[str, str]:
    """Fill a folder with ``count`` small files, of which a share is bad in all ways in turn.

    Returns:
        The kind by path of the bad ones.
    """
    folder.mkdir()
    step = round(1 / share)
    bad = {}
    for i in range(count):
        if i % step:
            noise(16, 12, seed=i).save(folder / f'{i:05}.png')
        else:
            kind = LISTED[i // step % len(LISTED)]
            bad[str(write_unreadable(kind, folder, f'{i:05}'))] = kind
    return bad
