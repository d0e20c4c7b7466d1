"""The page: what runs have to tell, in words, tables and curves, in one file."""

import base64
from collections.abc import Sequence
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from mmengine.config import Config

from cae_mm.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, Chart, draw_chart
from cae_mm.report.probes import Probes, read_probes
from cae_mm.report.run import Run
from cae_mm.report.values import differences, flatten
from cae_mm.version import __version__

COLORS = 8  # of runs, in page.html
STEPS = 6  # of the sheets of one name that are shown
TRAINING = ('lr', 'grad_norm', 'images_per_s', 'data_time', 'memory')  # neither loss nor metric
NO_DIFFERENCE = ('work_dir', 'launcher', 'resume', 'train_pipeline', 'test_pipeline', 'settings')
MEANINGS = {
    'loss': 'What is minimised.',
    'loss_main': 'Prediction of masked patches: cross entropy of tokens, or squared error.',
    'loss_align': 'Alignment: squared error of predicted and encoded latents, times its weight.',
    'token_acc': 'Share of masked patches whose token is guessed right. Rises.',
    'align_cos': 'Cosine of predicted and encoded latents. Drops at first, then rises.',
    'latent_std': 'Spread of predicted latents over images. Towards 0 is collapse.',
    'target_codes': 'Different tokens in a batch. Few of them mean a poor tokenizer.',
    'perplexity': 'How many tokens the d-VAE uses, weighted. Few mean codebook collapse.',
    'knn_top1': 'Accuracy of nearest neighbours on labelled images. Rises.',
    'lr': 'Learning rate.',
    'grad_norm': 'Norm of the gradients, before clipping.',
    'images_per_s': 'Over all processes.',
    'data_time': 'Seconds of a step that wait for data.',
}
GLANCE = {
    'method': ('model.type',),
    'encoder': ('model.backbone.arch',),
    'width': ('model.backbone.arch.embed_dims',),
    'depth': ('model.backbone.arch.depth', 'model.backbone.arch.num_layers'),
    'image size': ('model.backbone.img_size',),
    'patch size': ('model.backbone.patch_size',),
    'targets': ('model.target_generator.type',),
    'mask ratio': (
        'train_dataloader.dataset.pipeline.CAEMaskGenerator.mask_ratio',
        'model.backbone.mask_ratio',
    ),
    'images in a step': ('train_dataloader.batch_size',),
    'epochs': ('train_cfg.max_epochs',),
    'iterations': ('train_cfg.max_iters',),
    'optimizer': ('optim_wrapper.optimizer.type',),
    'learning rate': ('optim_wrapper.optimizer.lr',),
    'weight decay': ('optim_wrapper.optimizer.weight_decay',),
    'data': ('train_dataloader.dataset.data_root',),
    'seed': ('randomness.seed',),
}


class Row(NamedTuple):
    """A row of the table of probes."""

    run: int | None  # number of the run whose encoder it is
    name: str
    probes: Probes


def write_page(
    runs: Sequence[Run],
    results: Sequence[Path],
    out: Path,
    base: dict[str, Any] | None = None,
) -> list[str]:
    """Write the page of runs.

    Args:
        runs: One, or several to compare.
        results: Files of quick probes besides those in the work directories.
        out: File to write; its folder is made.
        base: Flattened config to compare those of the runs with.

    Returns:
        What could not be read; the page says it too.

    Raises:
        FileNotFoundError: If one of the work directories has neither numbers nor probes.
    """
    name_runs(runs)
    problems: list[str] = []
    rows = []
    own = [find_own_results(run) for run in runs]
    for path in dict.fromkeys([*chain(*own), *results]):
        try:
            rows.append(make_row(path, runs))
        except ValueError as error:
            problems.append(str(error))
    for run, found in zip(runs, own, strict=True):
        if not run.curves and not run.parts and not found:
            raise FileNotFoundError(
                f'{run.folder} is no work directory of a run: it has neither TIME/vis_data, which '
                'LocalVisBackend of the visualizer writes, nor results.json of quick probes'
            )
    columns = list(dict.fromkeys(key for row in rows for key in row.probes.accuracies))
    names, compared = compare(runs, base)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # everything, whatever it is called
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=format_number, embed=embed)
    content = dict(
        runs=runs,
        colors=COLORS,
        charts=group_charts(runs),
        meanings=MEANINGS,
        rows=rows,
        columns=columns,
        best={c: max(row.probes.accuracies.get(c, 0) for row in rows) for c in columns},
        glance=glance(runs),
        names=names,
        compared=compared,
        sheets=choose_sheets(runs),
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=RIGHT,
        bottom=BOTTOM,
        version=__version__,
        now=datetime.now().strftime('%Y-%m-%d %H:%M'),
    )
    for run in runs:
        problems += run.problems
    page = environment.get_template('page.html').render(content, problems=problems)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding='utf-8', errors='replace')
    return problems


def name_runs(runs: Sequence[Run]) -> None:
    """Name runs by the ends of their paths, as short as tells them apart."""
    parts = [run.folder.absolute().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise ValueError('the same work directory was named twice')
    if len(parts) > 1:
        while len({path[-1] for path in parts}) == 1:
            parts = [path[:-1] for path in parts]
    length = 2 if len(parts) == 1 else 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    for run, path in zip(runs, parts, strict=True):
        run.name = '/'.join(path[-length:])


def find_own_results(run: Run) -> list[Path]:
    """Results of probes in a work directory."""
    return [*run.folder.glob('results.json'), *sorted(run.folder.glob('*/results.json'))]


def make_row(path: Path, runs: Sequence[Run]) -> Row:
    """Read results, and find the run that they are of."""
    probes = read_probes(path)
    places = [path.absolute(), Path(probes.checkpoint).absolute()]
    for i, run in enumerate(runs):
        if any(run.folder.absolute() in place.parents for place in places):
            return Row(i, run.name, probes)
    return Row(None, path.parent.name, probes)


def group_charts(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """Draw all numbers that at least one of the runs has, under three titles."""
    groups: dict[str, list[Chart]] = {'Losses': [], 'Metrics': [], 'Training': []}
    for unit, name in sorted({key for run in runs for key in run.curves}):
        title = 'Losses' if 'loss' in name else 'Training' if name in TRAINING else 'Metrics'
        chart = draw_chart(name, unit, [run.curves.get((unit, name), []) for run in runs])
        if chart:
            groups[title].append(chart)
    return {title: charts for title, charts in groups.items() if charts}


def glance(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return what people ask for first, of each run."""
    rows = {
        name: [next((run.config[key] for key in keys if key in run.config), '') for run in runs]
        for name, keys in GLANCE.items()
    }
    return {name: row for name, row in rows.items() if any(value != '' for value in row)}


def compare(
    runs: Sequence[Run], base: dict[str, Any] | None
) -> tuple[list[str], dict[str, list[Any]]]:
    """Names of the columns, and the rows in which configs differ; both empty without a base."""
    names, configs = [run.name for run in runs], [run.config for run in runs]
    if base is None and len(runs) == 1 and (path := find_base(runs[0])):
        base = flatten(Config.fromfile(path).to_dict())
    if base is not None:
        names, configs = ['base', *names], [base, *configs]
    return (names, differences(configs, NO_DIFFERENCE)) if len(configs) > 1 else ([], {})


def find_base(run: Run) -> Path | None:
    """Find our config with the name of that which the run was started with."""
    package = Path(__file__).parents[1]
    folders = (package / '.mim/configs', package.parent / 'configs')
    folder = next((folder for folder in folders if folder.is_dir()), None)
    names = [path.name for path in run.folder.glob('*.py')]
    found = [path for name in names for path in (folder.rglob(name) if folder else [])]
    return found[0] if len(found) == 1 else None


def choose_sheets(runs: Sequence[Run]) -> dict[str, list[tuple[int, list[tuple[int, Path]]]]]:
    """By name of a sheet, each run's number with its steps: the first, the last, some between."""
    sheets: dict[str, list[tuple[int, list[tuple[int, Path]]]]] = {}
    for i, run in enumerate(runs):
        for name, steps in run.pictures.items():
            items = list(steps.items())
            count = min(STEPS, len(items))
            chosen = {round(j * (len(items) - 1) / max(count - 1, 1)) for j in range(count)}
            sheets.setdefault(name, []).append((i, [items[j] for j in sorted(chosen)]))
    return sheets


def embed(path: Path) -> str:
    """A picture as an address that holds it."""
    return 'data:image/png;base64,' + base64.b64encode(path.read_bytes()).decode()


def format_number(value: Any) -> str:
    """Four digits of a number; all else as it is."""
    return f'{value:.4g}' if isinstance(value, float) else str(value)
