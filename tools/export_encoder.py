"""Write an encoder as ONNX (.onnx) or as a program of torch.export (.pt2), and check the file.

python tools/export_encoder.py CONFIG CHECKPOINT --out encoder.onnx --out-type cls_token --normalize
"""

import argparse
from pathlib import Path

from cae_mm.conversion.deploy import BATCH_SIZES, ExportedEncoder, export_encoder
from cae_mm.engine.cli import add_config_arguments, load_config
from cae_mm.evaluation.encoder import read_size
from cae_mm.models.vit import OUT_TYPES


def main() -> None:
    """Export, check and say what the file expects and gives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_arguments(parser, 'any config whose model.backbone is a cae_mm.CAEViT')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument('--out', type=Path, required=True, help='encoder.onnx or encoder.pt2')
    parser.add_argument('--img-size', nargs=2, type=int, metavar=('H', 'W'))
    parser.add_argument('--out-type', choices=OUT_TYPES, help="default: the config's")
    parser.add_argument('--normalize', action='store_true', help='take pixels in [0, 255]')
    parser.add_argument('--prefix', default='backbone.', help="of the encoder's keys in the file")
    args = parser.parse_args()

    cfg = load_config(args.config, args.cfg_options)
    model = ExportedEncoder(
        cfg,
        args.checkpoint,
        prefix=args.prefix,
        out_type=args.out_type,
        takes_pixels=args.normalize,
    )
    H, W = args.img_size or read_size(cfg)
    difference = export_encoder(model, (H, W), args.out)
    values = 'in [0, 255]'
    if not args.normalize:
        mean, std = (
            ', '.join(f'{value:g}' for value in buffer.flatten().tolist())
            for buffer in (model.mean, model.std)
        )
        values = f'normalised: minus ({mean}), divided by ({std})'
    print(
        f'{args.out}: {args.out.stat().st_size / 1e6:.1f} MB\n'
        f'  input   images, float32 (any batch, 3, {H}, {W}), {model.channels}, {values}\n'
        f'  output  {", ".join(model.output_names)}\n'
        f'  checked with batches of {" and ".join(map(str, BATCH_SIZES))} random images: largest '
        f'difference {difference:.1e} of the largest value'
    )


if __name__ == '__main__':
    main()
