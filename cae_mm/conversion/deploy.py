"""The encoder without OpenMMLab: as ONNX or as a program of torch.export, the file checked."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.export import Dim

from cae_mm.checkpoints import read_checkpoint
from cae_mm.checkpoints.pretrained import find_file
from cae_mm.conversion.card import write_card
from cae_mm.evaluation.encoder import load_backbone, read_normalizer
from cae_mm.models import CAEViT

OPSET = 17  # the highest that the exporter of torch 2.4 knows in full
MAX_DIFFERENCE = 1e-4  # of the largest value
ONNX_LIMIT = 2**31  # bytes, protobuf's
MAX_BATCH = 2**20  # torch 2.4 wants a bound where there are windows
BATCH_SIZES = (1, 3)  # other than the 2 that the graph is made with

Run = Callable[[Tensor], Sequence[Tensor]]


class ExportedEncoder(nn.Module):
    """What goes into the file: the backbone, behind the normalisation if it is wanted.

    Args:
        cfg: Config whose ``model.backbone`` is a ``CAEViT``; others raise ValueError.
        checkpoint: Its weights, or 'random'.
        prefix: Of the backbone's keys in the checkpoint.
        out_type: What the backbone returns; None means what the config says.
        takes_pixels: Whether images come in [0, 255] rather than normalised.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        cfg: Config,
        checkpoint: str | Path,
        *,
        prefix: str = 'backbone.',
        out_type: str | None = None,
        takes_pixels: bool = False,
    ) -> None:
        super().__init__()
        backbone = load_backbone(cfg, checkpoint, prefix)
        if not isinstance(backbone, CAEViT):
            raise ValueError(f'{cfg.filename} has a {type(backbone).__name__}, not a cae_mm.CAEViT')
        backbone.out_type = kind = out_type or backbone.out_type
        indices = backbone.out_indices
        self.output_names = [kind] if len(indices) == 1 else [f'{kind}_{i}' for i in indices]
        self.backbone, self.takes_pixels = backbone, takes_pixels
        self.source = None if checkpoint == 'random' else find_file(checkpoint, 'export')
        normalizer = read_normalizer(cfg)
        self.channels = 'RGB' if normalizer.to_rgb else 'BGR'
        self.register_buffer('mean', normalizer.means[0])  # [1, C, 1, 1]
        self.register_buffer('std', normalizer.stds[0])
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Outputs of ``images``, shape (B, C, H, W), in the order of ``channels``."""
        return self.backbone((images - self.mean) / self.std if self.takes_pixels else images)

    def draw_images(self, batch_size: int, size: tuple[int, int]) -> Tensor:
        """Random images in the range that is expected."""
        images = torch.randn(batch_size, 3, *size)
        return (64 * images + 128).clamp(0, 255) if self.takes_pixels else images


def export_encoder(model: ExportedEncoder, size: tuple[int, int], path: Path) -> float:
    """Write a file for any batch of images of ``size``, height and width, check it, add a card.

    Returns:
        The largest difference from the model, relative to the largest value.

    Raises:
        ImportError: If what ONNX needs is not installed.
        ValueError: If the file's kind is unknown, the model is too large for ONNX, or the file
            does not return what the model returns; then an earlier one stays as it is.
    """
    _check_kind(model, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images = model.draw_images(2, size)
    model(images)  # positions of this size are made now, not in the graph
    new = path.with_name(f'unfinished_{path.name}')  # the suffix says the format
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of constants in a trace, of torch's own reader
            run = WRITERS[path.suffix](model, images, new)
        difference = _compare(run, model, size)
        new.replace(path)
    except Exception as error:
        raise ValueError(f'{path} was not written: {error}') from error
    finally:
        new.unlink(missing_ok=True)
    _write_card(model, size, path, difference)
    return difference


def _write_card(
    model: ExportedEncoder, size: tuple[int, int], path: Path, difference: float
) -> None:
    mean, std = (tuple(round(v, 4) for v in b.flatten().tolist()) for b in (model.mean, model.std))
    write_card(
        path,
        replace(
            model.backbone.describe(),
            img_size=size,
            mean=mean,
            std=std,
            to_rgb=model.channels == 'RGB',
        ),
        read_checkpoint(model.source) if model.source else None,
        library=LIBRARIES[path.suffix],
        code=READERS[path.suffix].format(name=path.name, names=', '.join(model.output_names)),
        checked=f'read back, outputs of random images differ by {difference:.1e} of the largest',
        takes_pixels=model.takes_pixels,
    )


def write_program(model: ExportedEncoder, images: Tensor, path: Path) -> Run:
    """Write a program of torch.export with dynamic batch, and read it back."""
    batch = {'images': {0: Dim('batch', max=MAX_BATCH)}}
    program = torch.export.export(model, (images,), dynamic_shapes=batch, strict=False)
    torch.export.save(program, path)
    return torch.export.load(path).module()


def write_onnx(model: ExportedEncoder, images: Tensor, path: Path) -> Run:
    """Write ONNX with dynamic batch, and read it back into onnxruntime.

    torch's older exporter, which traces the model, is in all versions of torch; the newer one is
    not usable in 2.4. Numbers that tracing fixes are those of the image's size.
    """
    import onnxruntime

    torch.onnx.export(
        model,
        (images,),
        str(path),
        input_names=['images'],
        output_names=model.output_names,
        dynamic_axes={name: {0: 'batch'} for name in ('images', *model.output_names)},
        opset_version=OPSET,
        dynamo=False,
    )
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: [*map(torch.from_numpy, session.run(None, {'images': images.numpy()}))]


WRITERS = {'.onnx': write_onnx, '.pt2': write_program}
# for the card
LIBRARIES = {'.onnx': 'onnxruntime', '.pt2': 'torch'}
READERS = {
    '.onnx': "import onnxruntime\n\nsession = onnxruntime.InferenceSession('{name}')\n"
    "outputs = session.run(None, {{'images': images.numpy()}})  # {names}",
    '.pt2': "encoder = torch.export.load('{name}').module()\noutputs = encoder(images)  # {names}",
}


def _check_kind(model: ExportedEncoder, path: Path) -> None:
    if path.suffix not in WRITERS:
        raise ValueError(f'{path}: the name must end in {" or ".join(WRITERS)}')
    if path.suffix != '.onnx':
        return
    missing = [name for name in ('onnx', 'onnxruntime') if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'{path} needs {" and ".join(missing)}: '
            "pip install -c constraints/onedl.txt 'cae-mm[export]'"
        )
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    if weights >= ONNX_LIMIT:
        raise ValueError(f'{weights / 1e9:.1f} GB do not fit into one ONNX file: write a .pt2')


def _compare(run: Run, model: ExportedEncoder, size: tuple[int, int]) -> float:
    """Largest difference from the model, relative to the largest value; raise if it is too much."""
    largest = 0.0
    for batch_size in BATCH_SIZES:
        images = model.draw_images(batch_size, size)
        for actual, expected in zip(run(images), model(images), strict=True):
            if actual.shape != expected.shape:
                shapes = f'{tuple(actual.shape)}, not {tuple(expected.shape)}'
                raise ValueError(f'it returns an output of shape {shapes}')
            difference = ((actual - expected).abs().max() / expected.abs().max()).item()
            if not difference <= MAX_DIFFERENCE:  # NaN is none either
                raise ValueError(
                    f'outputs differ by {difference:.1e} of the largest value, more than '
                    f'{MAX_DIFFERENCE:.0e}'
                )
            largest = max(largest, difference)
    return largest
