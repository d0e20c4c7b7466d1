"""Decode all images of a folder, a list or tar shards as training would; say what is wrong.

python tools/check_images.py FOLDER [--list FILE] [--workers 8] [--out unreadable.txt]

FOLDER holds images, with or without sub-folders, or tar shards. Nothing in it is changed. Images
that cannot be read, and those at which a decoder crashes or does not end, are written to a file
with the reason; then the exit status is 1.
"""

import argparse
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import joblib
from mmengine.dataset import BaseDataset
from mmpretrain.datasets import CustomDataset
from tqdm import tqdm

from cae_mm.datasets import ShardDataset
from cae_mm.datasets.loading import decode, explain, printable, read_file
from cae_mm.datasets.shard_index import EXTENSIONS
from cae_mm.datasets.unreadable import Unreadable, UnreadableList
from cae_mm.engine.data import check_dataset

CHUNK = 16  # images that a worker gets at a time
SMALL = 32  # pixels; an image with a shorter side says little
LONG = 8  # longer side over shorter
EXAMPLES = 3


class Outcome(NamedTuple):
    """What was found out about an image; ``reason`` is empty if it can be read."""

    path: str
    reason: str = ''
    height: int = 0
    width: int = 0
    digest: bytes = b''


class Worker:
    """A process that looks at one image after the other; one that dies of an image is replaced.

    Args:
        dataset: What it reads.
        indices: Its first images.
    """

    def __init__(self, dataset: BaseDataset, indices: list[int]) -> None:
        self.dataset = dataset
        self.start(indices)

    def start(self, indices: list[int]) -> None:
        """Start the process."""
        context = multiprocessing.get_context('fork')
        self.connection, other = context.Pipe()
        self.process = context.Process(
            target=serve, args=(self.dataset, other, os.getpid()), daemon=True
        )
        self.process.start()
        other.close()  # so that the end of the process can be seen
        self.give(indices)

    def give(self, indices: list[int]) -> None:
        """Give it more images, once it is through."""
        self.pending = deque(indices)
        self.since = time.monotonic()  # when it began with the first that is pending
        self.connection.send(indices)

    def look(self, seconds: float) -> Outcome | None:
        """Return what it found out about the image it is at, or that this was its end."""
        if self.connection.poll():
            try:
                outcome = self.connection.recv()
            except (EOFError, ConnectionError):
                self.process.join()
                code = self.process.exitcode
                how = signal.Signals(-code).name if code < 0 else f'status {code}'
                return self.restart(f'the decoder crashed with {how}')
            self.pending.popleft()
            self.since = time.monotonic()
            return outcome
        if time.monotonic() - self.since > seconds:
            return self.restart(f'it takes more than {seconds:g} seconds')
        return None

    def restart(self, reason: str) -> Outcome:
        """Go on behind the image that was its end."""
        self.end()
        path = self.dataset.get_data_info(self.pending.popleft())['img_path']
        self.start(list(self.pending))
        return Outcome(path, reason)

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def serve(dataset: BaseDataset, connection: Connection, parent: int) -> None:
    """Answer lists of indices with what was found out about each image."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends all
    while os.getppid() == parent:
        if connection.poll(1.0):
            for index in connection.recv():
                connection.send(examine(dataset, index))


def examine(dataset: BaseDataset, index: int) -> Outcome:
    """Read and decode an image."""
    info: dict[str, Any] = {}
    try:
        info = dataset.get_data_info(index)
        content = info.get('img_bytes')
        content = read_file(info['img_path']) if content is None else content
        height, width, _ = decode(content).shape
    except Exception as error:  # decoders raise almost anything on broken files
        return Outcome(info.get('img_path', f'image {index}'), explain(error))
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return Outcome(info['img_path'], '', height, width, digest)


def examine_all(dataset: BaseDataset, processes: int, seconds: float) -> Iterator[Outcome]:
    """Look at all images in parallel, in any order.

    Args:
        dataset: Of images.
        processes: That do it.
        seconds: That an image may take.
    """
    indices = iter(range(len(dataset)))
    chunks = iter(lambda: list(islice(indices, CHUNK)), [])
    workers = [Worker(dataset, chunk) for chunk in islice(chunks, processes)]
    while workers:
        wait([worker.connection for worker in workers], timeout=1.0)
        for worker in list(workers):
            if outcome := worker.look(seconds):
                yield outcome
            if worker.pending:
                continue
            if chunk := next(chunks, None):
                worker.give(chunk)
            else:
                worker.end()
                workers.remove(worker)


class Report:
    """Counts what is wrong with images."""

    def __init__(self) -> None:
        self.count = self.copies = 0
        self.bad: list[Unreadable] = []
        self.small: list[str] = []
        self.long: list[str] = []
        self.digests: set[bytes] = set()

    def add(self, outcome: Outcome) -> None:
        """Count an image."""
        self.count += 1
        if outcome.reason:
            self.bad.append(Unreadable(outcome.path, outcome.reason))
            return
        short, long = sorted((outcome.height, outcome.width))
        text = f'{printable(outcome.path)} ({outcome.width} x {outcome.height})'
        if short < SMALL:
            self.small.append(text)
        if long > LONG * short:
            self.long.append(text)
        self.copies += outcome.digest in self.digests
        self.digests.add(outcome.digest)

    def lines(self, seconds: float) -> Iterator[str]:
        """Yield what to print."""
        yield f'{self.count} images in {seconds:.1f} s: {self.count / seconds:.0f} images/s'
        yield f'cannot be read: {len(self.bad)}'
        reasons = Counter(re.sub(r'\d+', 'N', image.reason) for image in self.bad)
        yield from (f'{count:8}  {reason}' for reason, count in reasons.most_common())
        for text, found in (
            (f'with a side below {SMALL} pixels', self.small),
            (f'of sides beyond 1:{LONG}', self.long),
        ):
            yield f'{text}: {len(found)}'
            yield from (f'          {example}' for example in sorted(found)[:EXAMPLES])
        yield f'the same file as another: {self.copies}'


def open_dataset(folder: Path, listed: str) -> BaseDataset:
    """The images that training would find."""
    if not listed and next(folder.glob('*.tar'), None):
        return ShardDataset(str(folder))
    options = dict(with_label=False, extensions=EXTENSIONS, ann_file=listed)
    check_dataset(CustomDataset(str(folder), lazy_init=True, **options))
    return CustomDataset(str(folder), **options)


def main() -> int:
    """Look at all images; return 1 if one cannot be read, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help='of images or of tar shards')
    parser.add_argument('--list', default='', help='file with a path in FOLDER on each line')
    parser.add_argument('--workers', type=int, default=joblib.cpu_count(), help='processes')
    parser.add_argument('--seconds', type=float, default=60, help='that an image may take')
    parser.add_argument(
        '--out', type=Path, default=Path('unreadable.txt'), help='gets paths and reasons'
    )
    args = parser.parse_args()

    dataset = open_dataset(args.folder, args.list and str(Path(args.list).absolute()))
    start, report = time.monotonic(), Report()
    outcomes = examine_all(dataset, max(args.workers, 1), args.seconds)
    for outcome in tqdm(outcomes, total=len(dataset), unit=' images', dynamic_ncols=True):
        report.add(outcome)
    print(*report.lines(time.monotonic() - start), sep='\n')
    args.out.unlink(missing_ok=True)
    if report.bad:
        UnreadableList(args.out).add(sorted(report.bad))
        print(f'{args.out} names those that cannot be read')
    return int(bool(report.bad))


if __name__ == '__main__':
    sys.exit(main())
