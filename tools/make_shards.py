"""Write the images of a folder into tar shards, for `settings.shards`.

python tools/make_shards.py FOLDER OUT [--shard-mb 256] [--seed 0]

Files are copied as they are, in an order that is shuffled once: training reads shards nearly from
front to back, and images of one class must not lie side by side. Where all images lie in
sub-folders, these are the classes. Started again after a stop, it goes on where it was.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mmpretrain.datasets import CustomDataset
from tqdm import tqdm
from webdataset import TarWriter

from cae_mm.datasets.shard_index import (
    EXTENSIONS,
    INDEX_FILE,
    NO_LABEL,
    THREADS,
    load_index,
    scan_shard,
)
from cae_mm.datasets.shards import CLASSES_FILE


class Source(NamedTuple):
    """An image file: its member's key and ending, its size in bytes, its class."""

    path: Path
    key: str
    ending: str
    size: int
    label: int


def list_images(folder: Path) -> tuple[list[Source], list[str]]:
    """List the images that training on the folder would find, and the classes, if any."""
    data = CustomDataset(str(folder), with_label=False, extensions=EXTENSIONS)
    paths = [Path(data.get_data_info(i)['img_path']) for i in range(len(data))]
    parts = [path.relative_to(folder).parts for path in paths]
    classes = sorted({part[0] for part in parts}) if min(map(len, parts)) > 1 else []
    labels = {name: label for label, name in enumerate(classes)}
    taken: set[str] = set()
    sources = []
    for path, part in zip(paths, parts, strict=True):
        key = make_key(path.relative_to(folder), taken)
        size, label = path.stat().st_size, labels.get(part[0], NO_LABEL)
        sources.append(Source(path, key, path.suffix[1:].lower(), size, label))
    return sources, classes


def make_key(path: Path, taken: set[str]) -> str:
    """Make a key of its own for a path: a dot in a file name would begin the ending."""
    stem = key = path.with_name(path.stem.replace('.', '_')).as_posix()
    number = 1
    while key in taken:  # a.jpg beside a.png, a.b.jpg beside a_b.jpg
        number += 1
        key = f'{stem}_{number}'
    taken.add(key)
    return key


def split(sources: Sequence[Source], limit: int) -> Iterator[list[Source]]:
    """Cut a list into shards of at most ``limit`` bytes, or of one image."""
    shard: list[Source] = []
    size = 0
    for source in sources:
        if shard and size + source.size > limit:
            yield shard
            shard, size = [], 0
        shard.append(source)
        size += source.size
    yield shard


def check_folder(plan: dict[Path, list[Source]], out: Path) -> list[Path]:
    """Return the shards that a stopped run has finished; raise if there is anything else."""
    known = {path.name for path in plan} | {INDEX_FILE, CLASSES_FILE}
    others = [path.name for path in out.iterdir() if path.suffix != '.tmp'] if out.is_dir() else []
    if foreign := sorted(set(others) - known):
        raise FileExistsError(f'{out} has {foreign[0]}, not of this run: name another folder')
    done = [path for path in plan if path.exists()]
    if wrong := [path for path in done if not holds(path, plan[path])]:
        raise FileExistsError(
            f'{wrong[0]} has other images than those of this run (another folder, --shard-mb or '
            '--seed?): name another folder'
        )
    return done


def holds(path: Path, sources: Sequence[Source]) -> bool:
    """Whether a shard is whole and has these images."""
    shard = scan_shard(path)
    images = [(image.name, image.size, image.label) for image in shard.images]
    wanted = [(f'{each.key}.{each.ending}', each.size, each.label) for each in sources]
    return not shard.problem and images == wanted


def write_shard(path: Path, sources: Sequence[Source], progress: tqdm) -> None:
    """Write a shard under another name, look whether all is there, and rename it."""
    draft = path.with_suffix('.tmp')
    with draft.open('wb') as stream, ThreadPoolExecutor(THREADS) as pool:
        # the same bytes each time; names of any length
        with TarWriter(stream, encoder=False, mtime=0, format='PAX_FORMAT') as writer:
            contents = pool.map(Path.read_bytes, [source.path for source in sources])
            for source, content in zip(sources, contents, strict=True):
                label = {} if source.label == NO_LABEL else {'cls': str(source.label).encode()}
                writer.write({'__key__': source.key, source.ending: content, **label})
                progress.update()
    if not holds(draft, sources):
        raise RuntimeError(f'{draft} has not what was to be written: did images change meanwhile?')
    draft.replace(path)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help='images, with or without sub-folders')
    parser.add_argument('out', type=Path, help='folder of the shards')
    parser.add_argument('--shard-mb', type=float, default=256, help='megabytes of one, at most')
    parser.add_argument('--seed', type=int, default=0, help='of the order of the images')
    return parser.parse_args()


def main() -> None:
    """List, plan, write, count."""
    args = parse_args()
    if not args.folder.is_dir():
        raise FileNotFoundError(f'no folder at {args.folder.absolute()}')
    sources, classes = list_images(args.folder)
    random.Random(args.seed).shuffle(sources)
    shards = split(sources, int(args.shard_mb * 1e6))
    plan = {args.out / f'{i:06}.tar': shard for i, shard in enumerate(shards)}
    done = check_folder(plan, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    if classes:
        (args.out / CLASSES_FILE).write_text('\n'.join(classes))
    finished = sum(len(plan[path]) for path in done)
    with tqdm(total=len(sources), initial=finished, unit=' images', dynamic_ncols=True) as progress:
        for path in sorted(plan.keys() - set(done)):
            write_shard(path, plan[path], progress)
    count = len(load_index(args.out).images)
    if count != len(sources):
        raise RuntimeError(f'{count} images in {args.out}, but {len(sources)} in {args.folder}')
    size = sum(source.size for source in sources) / 1e9
    print(f'{count} images ({size:.3g} GB, {len(classes)} classes) in {len(plan)} shards')
    print(f'to train on them: --cfg-options settings.shards={args.out}')


if __name__ == '__main__':
    main()
