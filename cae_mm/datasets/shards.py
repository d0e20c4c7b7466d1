"""Images in tar shards as a dataset, and the order that reads them nearly one after the other."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset, DefaultSampler
from mmengine.dataset.base_dataset import force_full_init
from mmengine.dist import barrier, is_main_process

from cae_mm.datasets.shard_index import EXTENSIONS, NO_LABEL, load_index
from cae_mm.registry import DATA_SAMPLERS, DATASETS

CLASSES_FILE = 'classes.txt'  # beside the shards, one name a line
MAX_OPEN = 64  # shards of one process


@DATASETS.register_module()
class ShardDataset(BaseDataset):
    """All images in the ``*.tar`` of a folder, in the form of the webdataset library.

    Samples have ``img_bytes``, the file's content, ``img_path``, which names shard and member, and
    ``gt_label`` if wanted. An index of headers, kept beside the shards, makes every image
    accessible at once, so that samplers, resuming and workers are those of any other dataset.

    Args:
        data_root: The folder; ``classes.txt`` in it, if any, names the classes.
        with_label: Whether to read labels; each image then needs one.
        skip_broken: Whether to take what is whole of a shard that is cut short or damaged.
        options: Those of mmengine's ``BaseDataset``, such as ``pipeline``.
    """

    def __init__(
        self,
        data_root: str,
        *,
        with_label: bool = False,
        skip_broken: bool = False,
        **options: Any,
    ) -> None:
        self.with_label = with_label
        self.skip_broken = skip_broken
        super().__init__(data_root=data_root, serialize_data=False, **options)

    def load_data_list(self) -> Any:
        """Return an array of images, see ``Index``; one process makes the index for all."""
        folder = Path(self.data_root)
        index = load_index(folder, self.skip_broken) if is_main_process() else None
        barrier()
        index = index or load_index(folder, self.skip_broken)
        if not len(index.images):
            raise ValueError(f'no images in the shards of {folder}, none with {EXTENSIONS}')
        self.files = ShardFiles([str(folder / name) for name in index.shards['name']])
        if self.with_label:
            self._check_labels(index.images)
            if (classes := folder / CLASSES_FILE).is_file():
                self._metainfo.setdefault('classes', tuple(classes.read_text().splitlines()))
        return index.images

    def _check_labels(self, images: np.ndarray) -> None:
        missing = images[images['label'] == NO_LABEL]
        if len(missing):
            raise ValueError(
                f'{len(missing)} images have no label, {self._name(missing[0])} is the first: it '
                'needs a member with the ending .cls, as tools/make_shards.py writes for folders '
                'with classes'
            )

    def _name(self, image: np.void) -> str:
        return f'{self.files.paths[image["shard"]]}/{os.fsdecode(image["name"])}'

    @force_full_init
    def get_data_info(self, idx: int) -> dict[str, Any]:
        """Read an image's content, undecoded."""
        image = self.data_list[idx]
        name = self._name(image)
        try:
            content = self.files.read(image['shard'], image['offset'], image['size'])
        except OSError as error:
            raise OSError(f'cannot read {name}: {error}') from error
        info = dict(img_path=name, img_bytes=content, sample_idx=idx % len(self.data_list))
        return info | (dict(gt_label=int(image['label'])) if self.with_label else {})


class ShardFiles:
    """Open files of one process; those used longest ago are closed.

    Reading keeps no position in a file, so that forked workers may share it.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self.opened: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Read ``size`` bytes at ``offset``."""
        if shard not in self.opened:
            if len(self.opened) == MAX_OPEN:
                os.close(self.opened.popitem(last=False)[1])
            self.opened[shard] = os.open(self.paths[shard], os.O_RDONLY)
        self.opened.move_to_end(shard)
        return os.pread(self.opened[shard], size, offset)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.paths,)  # copies open files of their own

    def __del__(self) -> None:
        for file in self.opened.values():
            os.close(file)


@DATA_SAMPLERS.register_module()
class ShardSampler(DefaultSampler):
    """Shuffle shards, deal them out, and shuffle images that lie near each other.

    In each epoch shards are put in another order, and each process takes a stretch of it: other
    processes read other shards, but for those at the ends. Within a stretch an image moves by less
    than ``span`` images, so that no more than these are waited for at a time, and each shard is
    read once and in a short time. The order depends on (seed, epoch, processes) only.

    As with mmengine's sampler each process gets as many images: if they do not come out even, some
    images, fewer than processes, come twice.

    Args:
        dataset: A ``ShardDataset``.
        span: Images; a process with fewer of them shuffles them completely.
        seed: The same in all processes; None draws one.
    """

    def __init__(self, dataset: ShardDataset, span: int = 10_000, seed: int | None = None) -> None:
        if span < 1:
            raise ValueError(f'span must be at least 1 image, not {span}')
        super().__init__(dataset, shuffle=True, seed=seed)
        self.span = span

    def __iter__(self) -> Iterator[int]:
        """Iterate the indices of this process."""
        shards = self.dataset.data_list['shard']
        rng = np.random.default_rng([self.seed % 2**32, self.epoch])
        places = rng.permutation(shards.max() + 1)  # of the shards
        order = np.argsort(places[shards], kind='stable')  # images, shard by shard
        order = np.resize(order, self.total_size)  # begins again at the end
        stretches = order.reshape(self.world_size, self.num_samples)
        keys = rng.uniform(0, self.span, stretches.shape)
        if self.num_samples > self.span:
            keys += np.arange(self.num_samples)  # images that lie a span apart never swap
        return iter(stretches[self.rank][np.argsort(keys[self.rank])].tolist())
