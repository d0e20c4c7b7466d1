"""Features of a folder of JPEGs, as ``quick_probe`` extracts them, against what bounds them.

    python benchmarks/bench_features.py          # or: make bench

Photographs of ImageNet's usual size are decoded by workers while the encoder runs. Alone, each of
the two is measured with all cores of the CPU. With the encoder on a GPU they overlap and the
slower one is the bound. With the encoder on the CPU both need the same cores: an image takes the
time of decoding plus that of encoding, however well they overlap, so the bound on the rate is
1 / (1 / decoding + 1 / encoding). Nothing can be faster, as both rates are those of all cores.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import skimage.data
import torch
from harness import Options, Row, alternate, main
from mmengine.config import Config
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import ImageFolder

from cae_mm.evaluation.encoder import Encoder, load_encoder
from cae_mm.evaluation.features import extract_features, labelled_images

CONFIGS = Path(__file__).parents[1] / 'configs'
PHOTOGRAPHS = ('astronaut', 'chelsea', 'coffee', 'rocket')  # those that scikit-image has in it
SIZE = (500, 375)  # width and height of most images of ImageNet
BATCH_SIZE = 64
ENCODERS = {  # config, images
    'ViT-B/16, 224 px': ('linear/vit-base-p16_cae-pre_32xb512-linear-coslr-90e_in1k.py', 256),
    'ViT of 6 blocks, 128 px': (
        'imagenette/vit-mini-p16_cae-pre_1xb64-linear-coslr-6e_imagenette-128px.py',
        1024,
    ),
}


def measure(options: Options) -> list[Row]:
    """Measure one encoder that is slower than decoding, and one that is faster."""
    return [_measure(name, options) for name in ENCODERS]


def _measure(name: str, options: Options) -> Row:
    config, count = ENCODERS[name]
    cfg = Config.fromfile(CONFIGS / config)
    encoder = load_encoder(cfg, 'random', features=['cls', 'mean'], device=options.device)
    with _folder_of_jpegs(count) as folder:
        images = labelled_images(folder, encoder.size)
        batches = list(_extract(_NoEncoder(), images))
        seconds = alternate(
            {
                'decoding': lambda: list(_extract(_NoEncoder(), images)),
                'encoding': lambda: [encoder(batch).cpu() for batch in batches],
                'both': lambda: list(_extract(encoder, images)),
            },
            options,
        )
    decoding, encoding, both = (count / seconds[what] for what in seconds)
    shared = options.device == 'cpu'
    bound = 1 / (1 / decoding + 1 / encoding) if shared else min(decoding, encoding)
    formula = '1 / (1 / decoding + 1 / encoding)' if shared else 'the slower one'
    return Row(
        f'features, {name}, {encoder.precision.dtype}: images/s over their bound, {formula}',
        both / bound,
        0.9,
        detail=f'{both:.0f} images/s; decoding {decoding:.0f}, encoding {encoding:.0f}',
    )


class _NoEncoder:
    """Takes the encoder's place and returns the images themselves."""

    device = torch.device('cpu')

    def __call__(self, images: Tensor) -> Tensor:
        return images


def _extract(encoder: Encoder | _NoEncoder, images: ImageFolder) -> Iterator[Tensor]:
    return extract_features(encoder, images, range(len(images)), batch_size=BATCH_SIZE)


@contextmanager
def _folder_of_jpegs(count: int) -> Iterator[str]:
    """Photographs as JPEGs of quality 90 in one class, a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / 'class').mkdir()
        photographs = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
        for i in range(count):
            image = photographs[i % len(photographs)].resize(SIZE)
            image.save(Path(folder) / 'class' / f'{i:05}.jpg', quality=90)
        yield folder


if __name__ == '__main__':
    main(measure, __doc__)
