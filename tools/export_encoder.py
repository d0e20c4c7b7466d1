"""Write an encoder as ONNX (.onnx) or as a program of torch.export (.pt2), and check the file.

python tools/export_encoder.py CONFIG CHECKPOINT --out encoder.onnx --out-type cls_token --normalize
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from torch import Tensor, nn
from torch.export import Dim

from cae_mm.evaluation import load_backbone
from cae_mm.evaluation.encoder import read_normalizer, read_size
from cae_mm.models import CAEDataPreprocessor, CAEViT
from cae_mm.models.vit import OUT_TYPES

OPSET = 17  # the highest that the exporter of torch 2.4 knows in full
MAX_DIFFERENCE = 1e-4  # of the largest value
ONNX_LIMIT = 2**31  # bytes, protobuf's
MAX_BATCH = 2**20  # torch 2.4 wants a bound where there are windows
BATCH_SIZES = (1, 3)  # other than the 2 that the graph is made with

Run = Callable[[Tensor], list[Tensor]]


class ExportedEncoder(nn.Module):
    """What goes into the file: the backbone, behind the normalisation if it is wanted.

    Args:
        backbone: A ``CAEViT`` in eval mode.
        normalizer: Its normalisation of view 1, or None if images come normalised.
    """

    def __init__(self, backbone: CAEViT, normalizer: CAEDataPreprocessor | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.normalizes = normalizer is not None
        if normalizer is not None:
            self.register_buffer('mean', normalizer.means[0].clone())  # [1, C, 1, 1]
            self.register_buffer('std', normalizer.stds[0].clone())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Outputs of ``images``, shape (B, C, H, W); channels in the order the backbone sees."""
        return self.backbone((images - self.mean) / self.std if self.normalizes else images)

    def draw_images(self, batch_size: int, size: tuple[int, int]) -> Tensor:
        """Random images in the range that is expected."""
        images = torch.randn(batch_size, 3, *size)
        return (64 * images + 128).clamp(0, 255) if self.normalizes else images


def build(cfg: Config, args: argparse.Namespace) -> ExportedEncoder:
    """Build what goes into the file.

    Raises:
        ValueError: If the backbone is none of ours or the weights do not fit.
    """
    changes = {} if args.out_type is None else dict(out_type=args.out_type)
    backbone = load_backbone(cfg, args.checkpoint, prefix=args.prefix, **changes)
    if not isinstance(backbone, CAEViT):
        raise ValueError(f'{args.config} has a {type(backbone).__name__}, not a cae_mm.CAEViT')
    normalizer = read_normalizer(cfg) if args.normalize else None
    return ExportedEncoder(backbone, normalizer).eval().requires_grad_(False)


def output_names(backbone: CAEViT) -> list[str]:
    """The type of output, followed by the number of the block if there are several."""
    if len(backbone.out_indices) == 1:
        return [backbone.out_type]
    return [f'{backbone.out_type}_{index}' for index in backbone.out_indices]


def export_program(model: ExportedEncoder, images: Tensor, path: Path) -> Run:
    """Write a program of torch.export with dynamic batch, and read it back."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of torch's own reader, and of modules without a name
        program = torch.export.export(
            model,
            (images,),
            dynamic_shapes={'images': {0: Dim('batch', max=MAX_BATCH)}},
            strict=False,
        )
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
    return lambda images: list(loaded(images))


def export_onnx(model: ExportedEncoder, images: Tensor, path: Path) -> Run:
    """Write ONNX with dynamic batch, and read it back into onnxruntime.

    torch's older exporter, which traces the model, is in all versions of torch; the newer one is
    not usable in 2.4. Numbers that tracing fixes are those of the image's size.
    """
    import onnxruntime

    names = output_names(model.backbone)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of constants in the trace; the file is checked
        torch.onnx.export(
            model,
            (images,),
            str(path),
            input_names=['images'],
            output_names=names,
            dynamic_axes={name: {0: 'batch'} for name in ('images', *names)},
            opset_version=OPSET,
            dynamo=False,
        )
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: [
        torch.from_numpy(output) for output in session.run(None, {'images': images.numpy()})
    ]


def check(run: Run, model: ExportedEncoder, size: tuple[int, int]) -> float:
    """Largest difference between the file and the model, relative to the largest value."""
    differences = []
    for batch_size in BATCH_SIZES:
        images = model.draw_images(batch_size, size)
        for actual, expected in zip(run(images), model(images), strict=True):
            if actual.shape != expected.shape:
                raise ValueError(
                    f'the file gives an output of shape {tuple(actual.shape)} for {batch_size} '
                    f'images, the model {tuple(expected.shape)}'
                )
            differences.append(((actual - expected).abs().max() / expected.abs().max()).item())
    return max(differences)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise an error if the file's kind is unknown, or what it needs is not installed."""
    if args.out.suffix not in ('.onnx', '.pt2'):
        raise ValueError(f'--out {args.out}: the name must end in .onnx or .pt2')
    if args.out.suffix == '.onnx':
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f'{error}: --out *.onnx needs onnx and onnxruntime, '
                "pip install -c constraints/onedl.txt 'cae-mm[export]'"
            ) from error


def export(model: ExportedEncoder, size: tuple[int, int], path: Path) -> float:
    """Write the file, check it, and return the largest relative difference.

    Raises:
        ValueError: If the model is too large for ONNX, or the file does not give what the model
            gives; then it is deleted.
    """
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    if path.suffix == '.onnx' and weights >= ONNX_LIMIT:
        raise ValueError(f'{weights / 1e9:.1f} GB do not fit into one ONNX file: write a .pt2')
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images = model.draw_images(2, size)
    model(images)  # positions of this size are made now, not in the graph
    write = export_onnx if path.suffix == '.onnx' else export_program
    try:
        difference = check(write(model, images, path), model, size)
        if not difference <= MAX_DIFFERENCE:
            raise ValueError(
                f'outputs differ by {difference:.1e} of the largest value, more than '
                f'{MAX_DIFFERENCE:.0e}'
            )
    except Exception as error:
        path.unlink(missing_ok=True)
        raise ValueError(f'{path} was not kept: {error}') from error
    return difference


def main() -> None:
    """Export, check and say what the file expects and gives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='any config whose model.backbone is a cae_mm.CAEViT')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument('--out', type=Path, required=True, help='encoder.onnx or encoder.pt2')
    parser.add_argument('--img-size', nargs=2, type=int, metavar=('H', 'W'))
    parser.add_argument('--out-type', choices=OUT_TYPES, help="default: the config's")
    parser.add_argument('--normalize', action='store_true', help='take pixels in [0, 255]')
    parser.add_argument('--prefix', default='backbone.', help="of the encoder's keys in the file")
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args()
    check_arguments(args)
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)

    model = build(cfg, args)
    H, W = args.img_size or read_size(cfg)
    difference = export(model, (H, W), args.out)
    normalizer = read_normalizer(cfg)
    order = 'RGB' if normalizer.to_rgb else 'BGR'
    mean, std = (
        ', '.join(f'{value:g}' for value in values[0].flatten().tolist())
        for values in (normalizer.means, normalizer.stds)
    )
    values = 'in [0, 255]' if args.normalize else f'normalised: minus ({mean}), divided by ({std})'
    print(
        f'{args.out}: {args.out.stat().st_size / 1e6:.1f} MB\n'
        f'  input   images, float32 (any batch, 3, {H}, {W}), {order}, {values}\n'
        f'  output  {", ".join(output_names(model.backbone))}\n'
        f'  checked with batches of {" and ".join(map(str, BATCH_SIZES))} random images: largest '
        f'difference {difference:.1e} of the largest value'
    )


if __name__ == '__main__':
    main()
