"""Draw what an encoder makes of images.

    python tools/picture.py reconstruct CONFIG CHECKPOINT IMAGE ... --mask-ratio 0.3 0.5 0.75
    python tools/picture.py attention CONFIG CHECKPOINT IMAGE ... --of class
    python tools/picture.py features CONFIG CHECKPOINT IMAGE ... --against random
    python tools/picture.py patches CONFIG CHECKPOINT IMAGE --among FOLDER --patch 3 4
    python tools/picture.py neighbours CONFIG CHECKPOINT --train FOLDER --val FOLDER
    python tools/picture.py map CONFIG CHECKPOINT FOLDER

IMAGE is a file or a folder. docs/pictures.md explains each picture.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from torch import Tensor

from cae_mm.apis import init_model
from cae_mm.checkpoints.files import read_checkpoint
from cae_mm.checkpoints.pretrained import find_file
from cae_mm.engine.cli import add_config_arguments, add_device_argument, load_config
from cae_mm.evaluation.encoder import (
    FEATURES,
    RANDOM,
    Encoder,
    load_encoder,
    read_normalizer,
    read_size,
)
from cae_mm.evaluation.features import (
    check_same_classes,
    extract_features,
    labelled_images,
    subset_rows,
)
from cae_mm.evaluation.knn import check_neighbors
from cae_mm.models import CAEViT
from cae_mm.patches import Grid
from cae_mm.visualization.attention import (
    attended_share,
    attention_scale,
    attention_titles,
    class_attention,
    nearest_masked,
    paint_attention,
    probe_attention,
    regressor_attention,
    with_mean,
)
from cae_mm.visualization.components import paint_patches, principal_components, to_colors
from cae_mm.visualization.images import ImageFiles, find_images, to_picture
from cae_mm.visualization.maps import NEIGHBORS, import_umap, project, save_maps
from cae_mm.visualization.neighbors import mark_patch, nearest_images, nearest_patches
from cae_mm.visualization.pretraining import build_cae, load_views, load_weights
from cae_mm.visualization.reconstruction import DALLE_DECODER, GRAY, hidden_pixels, paint_files
from cae_mm.visualization.sheet import RIGHT, WRONG, frame, save_sheet

# options of attention, and whose attention has no use for them
UNUSED_BY = {'layer': ['probe'], 'patch': ['class', 'probe'], 'size': ['regressor']}


class Source(NamedTuple):
    """A trained model on disk."""

    name: str  # for the picture
    cfg: Config
    checkpoint: str


def main() -> None:
    """Read the command line and draw."""
    args = parse_args()
    args.sources = list_sources(args)
    args.draw(args)
    print(args.out)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(required=True, metavar='KIND')

    def add(name: str, draw: Any, text: str) -> argparse.ArgumentParser:
        kind = kinds.add_parser(name, help=text, description=text)
        kind.set_defaults(draw=draw)
        add_config_arguments(kind, 'of the pretraining, or of a model with this backbone')
        kind.add_argument('checkpoint', help="its weights, or 'random'")
        kind.add_argument(
            '--against',
            nargs='+',
            metavar='[CONFIG] CHECKPOINT',
            help="a second model beside it; 'random' is one with the same config. A config of its "
            'own is taken as it is, without --cfg-options',
        )
        kind.add_argument('--out', type=png, default=f'{name}.png', help='PNG to write')
        kind.add_argument('--seed', type=int, default=0, help='of masks, draws, random weights')
        add_device_argument(kind)
        return kind

    def add_images(kind: argparse.ArgumentParser) -> None:
        kind.add_argument('images', nargs='+', help='files, or folders')
        kind.add_argument('--count', type=positive, default=6, help='images drawn from a folder')

    kind = add('reconstruct', draw_reconstruction, 'image, masked input, targets and predictions')
    add_images(kind)
    kind.add_argument('--mask-ratio', nargs='+', type=float, help="default: the config's")
    kind.add_argument('--dalle-decoder', default=DALLE_DECODER, help="for DALL-E's tokens")

    kind = add('attention', draw_attention, 'where attention looks, mean and each head')
    add_images(kind)
    kind.add_argument(
        '--of',
        choices=['class', 'probe', 'regressor'],
        default='class',
        help="whose: the class token's, an attentive probe's query, or a masked patch's",
    )
    kind.add_argument('--layer', type=int, help='block of encoder or regressor; default: the last')
    add_patch(kind, 'of the regressor: the masked patch nearest to it')
    add_size(kind)

    kind = add('features', draw_features, 'three principal components of patches as colours')
    add_images(kind)
    add_size(kind)

    kind = add('patches', draw_patches, 'the patches of other images most like a patch')
    kind.add_argument('image', help='file with the patch')
    kind.add_argument('--among', nargs='+', required=True, help='files or folders to look in')
    kind.add_argument('--count', type=positive, default=1000, help='images drawn from a folder')
    kind.add_argument('--k', type=positive, default=8, help='how many')
    add_patch(kind, 'the patch')
    add_size(kind)

    kind = add('neighbours', draw_neighbors, 'images and their nearest neighbours')
    kind.add_argument('--train', required=True, help='folder with one sub-folder per class')
    kind.add_argument('--val', required=True, help='the same, the images to ask for are from it')
    kind.add_argument('--count', type=positive, default=6, help='images to ask for')
    kind.add_argument('--k', type=positive, default=8, help='how many neighbours')
    kind.add_argument('--feature', choices=FEATURES, default='mean')

    kind = add('map', draw_map, 't-SNE or UMAP of images, coloured by class')
    kind.add_argument('folder', help='with one sub-folder per class')
    kind.add_argument('--count', type=positive, default=1000, help='images drawn from it')
    kind.add_argument('--feature', choices=FEATURES, default='mean')
    kind.add_argument('--method', choices=NEIGHBORS, default='tsne')
    args = parser.parse_args()
    if args.draw is draw_attention:
        for option, kinds_without in UNUSED_BY.items():
            if getattr(args, option) is not None and args.of in kinds_without:
                parser.error(f'attention --of {args.of} takes no --{option}')
        args.layer = -1 if args.layer is None else args.layer
    return args


def positive(text: str) -> int:
    """Read a number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, not {value}')
    return value


def png(text: str) -> str:
    """Read the name of a picture."""
    if not text.lower().endswith('.png'):
        raise argparse.ArgumentTypeError(f'pictures are PNG files, {text} does not end with .png')
    return text


def add_patch(kind: argparse.ArgumentParser, text: str) -> None:
    """Add the place of a patch."""
    kind.add_argument(
        '--patch', nargs=2, type=int, metavar=('ROW', 'COLUMN'), help=f'{text}; default: the centre'
    )


def add_size(kind: argparse.ArgumentParser) -> None:
    """Add the size of images, where any will do."""
    kind.add_argument(
        '--size', type=positive, help="side in pixels; a multiple of the config's img_size is finer"
    )


def list_sources(args: argparse.Namespace) -> list[Source]:
    """Models to draw, with names that differ."""
    cfg = load_config(args.config, args.cfg_options)
    files = [(cfg, args.checkpoint)]
    if args.against:
        *config, checkpoint = args.against
        if len(config) > 1:
            raise ValueError(f'--against takes [CONFIG] CHECKPOINT, not {" ".join(args.against)}')
        files.append((load_config(config[0]) if config else cfg, checkpoint))
    return [Source(name, *file) for name, file in zip(name_models(files), files, strict=True)]


def name_models(files: Sequence[tuple[Config, str]]) -> list[str]:
    """Stems of checkpoints; of two runs, the first part of their paths, from the end, that differs.

    ``epoch_300`` says little beside the ``epoch_100`` of another folder.
    """
    names = [Path(checkpoint).stem for _, checkpoint in files]
    runs = [Path(checkpoint).absolute().parent for _, checkpoint in files]
    if len(set(names)) == len(names) and ('random' in names or len(set(runs)) == 1):
        return names
    paths = [Path(checkpoint) for _, checkpoint in files]
    for places in (runs, paths, [Path(cfg.filename).absolute() for cfg, _ in files]):
        for parts in zip(*(reversed(place.parts) for place in places), strict=False):
            if len(set(parts)) > 1:
                return [*parts]
    return [f'{name} {i}' for i, name in enumerate(names, start=1)]


def draw_reconstruction(args: argparse.Namespace) -> None:
    """A row for each image, mask ratio and model."""
    files, ratios = find_images(args.images, args.count, args.seed), args.mask_ratio or [None]
    painted = [
        paint_files(
            source.cfg,
            source.checkpoint,
            files,
            mask_ratios=ratios,
            decoder=args.dalle_decoder,
            device=args.device,
            seed=args.seed,
        )
        for source in args.sources
    ]
    if len({tuple(pictures) for pictures in painted}) > 1:
        raise ValueError('pixels and tokens have other pictures: draw the two models apart')
    rows = [[*zip(*pictures.values(), strict=True)] for pictures in painted]
    said = [f'{ratio:.0%}' if ratio else '' for ratio in ratios] * len(files)
    labels = [[f'{name} {ratio}'.strip() for ratio in said] for name, *_ in args.sources]
    save_sheet(take_turns(rows), args.out, titles=[*painted[0]], labels=take_turns(labels))


def draw_attention(args: argparse.Namespace) -> None:
    """A row for each image and model: the image, the mean over heads, each head."""
    files = find_images(args.images, args.count, args.seed)
    look = {'class': look_at_patches, 'probe': look_at_patches, 'regressor': look_through_regressor}
    seen = [look[args.of](source, files, args) for source in args.sources]
    top, note = attention_scale([maps for _, maps, _ in seen])
    rows = [paint_attention(firsts, maps, grid, top) for firsts, maps, grid in seen]
    for source, (_, maps, grid) in zip(args.sources, seen, strict=True):
        share = attended_share(maps[:, 0]).mean()
        h, w = grid
        print(f'{source.name}: the mean over heads attends to {share:.0%} of {h}x{w} patches')
    save_sheet(
        take_turns(rows),
        args.out,
        titles=attention_titles(max(maps.shape[1] for _, maps, _ in seen) - 1),
        labels=take_turns([[source.name] * len(files) for source in args.sources]),
        note=note,
    )


def look_at_patches(
    source: Source, files: Sequence[Path], args: argparse.Namespace
) -> tuple[Tensor, Tensor, Grid]:
    """Pictures, attention of class token or probe (B, 1 + heads, N), and grid."""
    size = find_size(source.cfg, args.size)
    crops = ImageFiles(files, size).load()
    if args.of == 'probe':
        model: Any = init_model(source.cfg, source.checkpoint, args.device)
        encoder = model.backbone
    else:
        encoder = load(source, args).backbone
    if not isinstance(encoder, CAEViT):
        raise ValueError(f'attention is that of a CAEViT, not of {type(encoder).__name__}')
    normalizer = read_normalizer(source.cfg).to(args.device)
    images = normalizer({'inputs': crops})['inputs'][0]
    if args.of == 'probe':
        weights = probe_attention(encoder, model.head, images)
    else:
        weights = class_attention(encoder, images, args.layer)
    p = encoder.patch_size
    return to_picture(crops), with_mean(weights).cpu(), (size[0] // p, size[1] // p)


def look_through_regressor(
    source: Source, files: Sequence[Path], args: argparse.Namespace
) -> tuple[Tensor, Tensor, Grid]:
    """The same of one masked patch of each image, which is marked in what the encoder sees."""
    model = load_weights(build_cae(source.cfg, args.seed), source.checkpoint).to(args.device)
    views, masks = load_views(source.cfg, files, args.seed)
    grid = model.backbone.grid
    patches = nearest_masked(masks, grid, find_patch(args, grid))
    [images, *_] = model.data_preprocessor({'inputs': views})['inputs']
    weights = regressor_attention(model, images, masks, patches, args.layer)
    pictures = to_picture(views[0])
    seen = pictures.masked_fill(hidden_pixels(masks, pictures, grid), GRAY)
    marked = [mark_patch(*each, grid) for each in zip(seen, patches.tolist(), strict=True)]
    return torch.stack(marked), with_mean(weights), grid


def draw_features(args: argparse.Namespace) -> None:
    """A row for each image: the image, and its patches coloured by each model."""
    files = find_images(args.images, args.count, args.seed)
    columns, titles = [], ['']
    for source in args.sources:
        images = ImageFiles(files, find_size(source.cfg, args.size))
        crops = images.load()
        tokens = load(source, args).patches(crops).cpu()
        scores, share = principal_components(tokens)
        grid = find_grid(tokens, images.size)
        columns.append([paint_patches(c, grid, images.size) for c in to_colors(scores)])
        titles.append(f'{source.name} ({share:.0%})')
    rows = [*zip(to_picture(crops), *columns, strict=True)]
    note = 'share of the variance in brackets'
    save_sheet(rows, args.out, titles=titles, note=note)


def draw_patches(args: argparse.Namespace) -> None:
    """A row for each model: the patch, and the images with the patches most like it."""
    if not Path(args.image).is_file():
        raise FileNotFoundError(f'{args.image}: no such image')
    among = find_images(args.among, args.count, args.seed)
    files = [path for path in among if not path.samefile(args.image)]
    if not files:
        raise ValueError(f'--among has no image but {args.image} itself')
    rows = []
    for source in args.sources:
        size = find_size(source.cfg, args.size)
        encoder, images = load(source, args), ImageFiles(files, size)
        crop = ImageFiles([Path(args.image)], size).load()
        tokens = encoder.patches(crop).cpu()[0]  # [N, D]
        grid = find_grid(tokens[None], size)
        row, column = find_patch(args, grid)
        patch = row * grid[1] + column
        batches = extract(encoder, images, range(len(files)), patches=True)
        found = nearest_patches(tokens[patch], batches, args.k)
        pictures = [mark_patch(to_picture(crop[0]), patch, grid)]
        for image, place in zip(*(each.tolist() for each in found[1:]), strict=True):
            pictures.append(mark_patch(to_picture(images[image][0]), place, grid))
        rows.append(pictures)
        print(source.name, *(f'{similarity:.2f}' for similarity in found[0]))
    labels = [source.name for source in args.sources]
    save_sheet(rows, args.out, titles=['', *map(str, range(1, args.k + 1))], labels=labels)


def draw_neighbors(args: argparse.Namespace) -> None:
    """A row for each image and model: the image, its neighbours, right ones framed in green."""
    rows, notes = [], []
    for source in args.sources:
        size = read_size(source.cfg)
        train, val = (labelled_images(folder, size) for folder in (args.train, args.val))
        check_same_classes(train, val)
        check_neighbors([args.k], len(train))
        encoder = load(source, args)
        asked, pictures = subset_rows(val, args.count, args.seed), []
        features = [
            torch.cat([*extract(encoder, images, chosen)])[:, 0]
            for images, chosen in ((val, asked), (train, range(len(train))))
        ]
        ids = nearest_images(*features, args.k)[1].tolist()
        right = 0
        for row, near in zip(asked, ids, strict=True):
            good = [train.targets[i] == val.targets[row] for i in near]
            right += sum(good)
            marked = zip(near, good, strict=True)
            neighbors = [frame(to_picture(train[i][0]), RIGHT if g else WRONG) for i, g in marked]
            pictures.append([to_picture(val[row][0]), *neighbors])
        rows.append(pictures)
        share = right / (len(asked) * args.k)
        notes.append(f'{source.name}: {share:.0%} of the neighbours are of the right class')
    labels = [[source.name] * args.count for source in args.sources]
    print(*notes, sep='\n')
    save_sheet(
        take_turns(rows),
        args.out,
        titles=['', *map(str, range(1, args.k + 1))],
        labels=take_turns(labels),
        note='; '.join(notes),
    )


def draw_map(args: argparse.Namespace) -> None:
    """A row for each model: points coloured by class, thumbnails."""
    if args.method == 'umap':
        import_umap()  # is it there?
    maps = {}
    for source in args.sources:
        images = labelled_images(args.folder, read_size(source.cfg))
        rows = subset_rows(images, args.count, args.seed)
        features = torch.cat([*extract(load(source, args), images, rows)])[:, 0]
        maps[source.name] = project(features.numpy(), args.seed, args.method)
    labels = [images.targets[row] for row in rows]
    pictures = [to_picture(images[row][0]) for row in rows]
    save_maps(maps, labels, images.classes, pictures, args.out)


def load(source: Source, args: argparse.Namespace) -> Encoder:
    """Encoder of a source: in a whole checkpoint under 'backbone.', or alone in its file."""
    prefix = 'backbone.'
    if source.checkpoint != RANDOM:
        file = read_checkpoint(find_file(source.checkpoint, 'the encoder'))
        prefix = prefix if any(key.startswith(prefix) for key in file.state) else ''
    return load_encoder(
        source.cfg,
        source.checkpoint,
        features=[getattr(args, 'feature', 'mean')],
        prefix=prefix,
        seed=args.seed,
        device=args.device,
    )


def extract(encoder: Encoder, images: Any, rows: Sequence[int], **options: Any) -> Any:
    """Features of images of a folder, batch by batch."""
    return extract_features(encoder, images, rows, batch_size=64, title='features', **options)


def find_size(cfg: Config, side: int | None) -> tuple[int, int]:
    """Height and width of the images, the config's unless a side is given."""
    return (side, side) if side else read_size(cfg)


def find_grid(tokens: Tensor, size: tuple[int, int]) -> Grid:
    """Rows and columns of tokens (B, N, D) of images of a size, whatever the backbone."""
    N = tokens.shape[1]
    rows = round((N * size[0] / size[1]) ** 0.5)
    return rows, N // rows


def find_patch(args: argparse.Namespace, grid: Grid) -> tuple[int, int]:
    """Row and column of the patch that was asked for."""
    place = tuple(args.patch or (side // 2 for side in grid))
    if not all(0 <= i < side for i, side in zip(place, grid, strict=True)):
        raise ValueError(f'--patch {place[0]} {place[1]}: there are {grid[0]}x{grid[1]} patches')
    return place


def take_turns(groups: Sequence[Sequence[Any]]) -> list[Any]:
    """First of each group, second of each group and so on."""
    return [each for turn in zip(*groups, strict=True) for each in turn]


if __name__ == '__main__':
    main()
