"""Compare ways of pretraining: a table of runs as data, run unattended, reported with its spread.

    python benchmarks/study.py split FOLDER OUT          # hold out a fifth of a labelled folder
    python benchmarks/study.py run TABLE.yml             # go on where it was; one run at a time
    python benchmarks/study.py report TABLE.yml          # table and picture of what is finished

Each finished run is a line of TABLE.jsonl: its row, seed, commit, machine, time, images, operations
and accuracies. benchmarks/README.md has the format of the table.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import cycle, product, zip_longest
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import mmengine
from harness import console, describe_machine
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich.table import Table

from cae_mm.checkpoints.whole import write_whole
from cae_mm.doctor.case import Machine
from cae_mm.engine.cli import load_config
from cae_mm.evaluation.quick_probe import QuickProbe
from cae_mm.plan.plan import make_plan

ROOT = Path(__file__).parents[1]
HELD_OUT = 5  # one of so many images of a class
NAMES: dict[str, tuple[str, str, Any]] = {  # column of the report: where quick probes have it
    'attentive': ('patches', 'attentive', 'accuracy'),
    'logreg': ('mean', 'logreg', 'accuracy'),
    'linear': ('cls', 'linear', 'accuracy'),
    'knn': ('mean', 'knn', 20),
}
COLUMNS = 4  # of panels in the picture
JUDGING = ('judge', 'judge_on', 'tasks')  # of a row: may change when it is trained


@dataclass(frozen=True)
class Row:
    """One way of pretraining.

    Attributes:
        name: Of the row, and of its folder.
        config: File of the pretraining.
        data: Folder with ``train`` and ``val``, each with one sub-folder per class.
        options: Values by key with dots that override the config's. ``{NAME}`` in a value is the
            last checkpoint of the row NAME: of the same seed if it has that, else of its first.
        seeds: Of the trainings; all random numbers follow from them.
        pflop: Operations of the training in 10^15, from which its epochs follow; None keeps those
            of the config, 0 trains nothing: a random encoder.
        tokens: Makes it a second round: ``of``, the row whose patch features are clustered (of the
            same seed, as above), the ``number`` of clusters, which are the targets, and ``blocks``,
            how many of that row's encoder are kept, fewer than it has.
        judge: Columns of the report that quick probes give, see ``NAMES``.
        judge_on: Other folders like ``data`` that quick probes judge on too, by the name that their
            columns begin with: {coco: FOLDER} gives coco/attentive and so on.
        tasks: Trainings that begin with the encoder, by the name of their column: ``config``,
            ``options``, and ``metric``, the name of a number of their evaluation, in percent.
        against: Names of the rows that the report takes it from, paired by seed.
    """

    name: str
    config: str
    data: str
    options: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    pflop: float | None = None
    tokens: dict[str, Any] | None = None
    judge: tuple[str, ...] = ('attentive', 'logreg', 'knn')
    judge_on: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    against: tuple[str, ...] = ()

    @property
    def needs(self) -> set[str]:
        """Names of the rows whose checkpoints it takes."""
        braces = {v[1:-1] for v in self.options.values() if isinstance(v, str) and v[:1] == '{'}
        return braces | ({self.tokens['of']} if self.tokens else set())


class Study:
    """A table of runs and what is known of them.

    Args:
        file: The table; results lie beside it.
        folder: Of the trainings.
    """

    def __init__(self, file: Path, folder: Path) -> None:
        table = mmengine.load(file)
        if unknown := set(table) - {'title', 'defaults', 'rows'}:
            raise ValueError(f'{file}: unknown {", ".join(sorted(unknown))}')
        self.title = table['title']
        rows = list(read_rows(table))
        self.rows = {row.name: row for row in rows}
        if len(self.rows) < len(rows):
            twice, _ = Counter(row.name for row in rows).most_common(1)[0]
            raise ValueError(f'{file}: two rows are called {twice}, give one another name')
        before: list[str] = []
        for name, row in self.rows.items():
            if absent := sorted(set(row.against) - set(self.rows)):
                raise ValueError(f'{file}: row {name} is against {absent[0]}, but no row is that')
            if late := sorted(row.needs - set(before)):
                raise ValueError(
                    f'{file}: row {name} needs {late[0]}, but no row before it is that'
                )
            if idle := sorted(need for need in row.needs if self.rows[need].pflop == 0):
                raise ValueError(
                    f'{file}: row {name} needs {idle[0]}, but that has pflop: 0 and no checkpoint'
                )
            before.append(name)
        self.results_file = file.with_suffix('.jsonl')
        self.folder = folder
        self.results: dict[tuple[str, int], dict[str, Any]] = {}
        if self.results_file.exists():
            lines = self.results_file.read_text().splitlines()
            self.results = {(r['row']['name'], r['seed']): r for r in map(json.loads, lines)}

    def what(self, row: Row) -> dict[str, Any]:
        """All that the table says of a row and of those that it needs, as JSON has it.

        What says nothing is left out.
        """
        needs = {name: self.what(self.rows[name]) for name in sorted(row.needs)}
        said = {**asdict(row), 'needs': needs}
        for key in ('seeds', 'against'):
            del said[key]
        kept = {key: value for key, value in said.items() if value not in (None, {}, ())}
        return json.loads(json.dumps(kept))

    def find_missing(self) -> tuple[Row, int] | None:
        """Return the next row and seed to run: the first seed of all rows comes before others.

        A finished run that is to be judged in another way comes again, from its checkpoint.

        Raises:
            ValueError: If a finished row is no longer what was trained.
        """
        wanted = [(row, seed) for row in self.rows.values() for seed in row.seeds]
        for row, seed in sorted(wanted, key=lambda each: each[0].seeds.index(each[1])):
            what, result = self.what(row), self.results.get((row.name, seed))
            if result is None:
                return self._first_needed(row, seed)
            known = result['row']
            if training_of(known) != training_of(what):
                raise ValueError(
                    f'row {row.name} is not what was run as seed {seed} in {self.results_file}: '
                    f'give it another name, or remove that line and {self.folder_of(row, seed)}'
                )
            if any(known.get(key) != what.get(key) for key in JUDGING):
                return self._first_needed(row, seed)
        return None

    def _first_needed(self, row: Row, seed: int) -> tuple[Row, int]:
        """The run itself, or one that it needs and of which there is no result or no checkpoint.

        Results come with a copy of the table, checkpoints do not.
        """
        for name in sorted(row.needs):
            needed, of = self.rows[name], self._seed_of(name, seed)
            if (name, of) not in self.results or not is_trained(self.folder_of(needed, of)):
                return self._first_needed(needed, of)
        return row, seed

    def run(self, row: Row, seed: int) -> None:
        """Run one and keep its result."""
        console.rule(f'{row.name}, seed {seed}')
        result = self._run(row, seed)
        self.results[row.name, seed] = result
        with open(self.results_file, 'a') as file:
            file.write(json.dumps(result) + '\n')
        console.print(result['accuracy'])

    def _run(self, row: Row, seed: int) -> dict[str, Any]:
        """Train, judge, and say at what price."""
        folder = self._claim_folder(row, seed)
        options = self._fill_in(row.options, seed)
        if row.tokens:
            options |= self._make_tokens(row, seed)
        options |= {'settings.data_root': str(ROOT / row.data), 'randomness.seed': seed}
        config = write_config(row.config, folder, options)
        result = dict(
            row=self.what(row), seed=seed, commit=find_commit(), machine=describe_machine()
        )
        checkpoint: Path | str = 'random'
        if row.pflop != 0:
            plan = make_plan(config, Machine(1), steps=0)
            assert plan.images is not None  # the plan has seen the folder
            if row.pflop is not None:
                epochs = round(row.pflop * 1e15 / (plan.flops_per_image * plan.images))
                config = write_config(config, folder, {'settings.epochs': max(epochs, 1)})
            train(config)
            checkpoint = last_checkpoint(folder)
            result |= read_price(folder, plan.flops_per_image, plan.images)
        judged = self._judge(row, seed, config, checkpoint) if row.judge else {}
        tasks = {name: self._train_task(row, seed, name, checkpoint) for name in row.tasks}
        return result | dict(accuracy=judged | tasks)

    def _claim_folder(self, row: Row, seed: int) -> Path:
        """Return the folder of a run, which goes on with what it finds there.

        Raises:
            ValueError: If it holds a training of a row that was another one.
        """
        folder, what = self.folder_of(row, seed), self.what(row)
        file = folder / 'row.json'
        if file.exists() and training_of(json.loads(file.read_text())) != training_of(what):
            raise ValueError(
                f'{folder} has a training of another row {row.name}: remove it, or give the row '
                'another name'
            )
        write_whole(file, json.dumps(what).encode())
        return folder

    def _make_tokens(self, row: Row, seed: int) -> dict[str, Any]:
        """Cluster the features of the first round; return the options that take the clusters."""
        assert row.tokens is not None
        number, first = row.tokens['number'], self._find_folder(row.tokens['of'], seed)
        out = self.folder_of(row, seed) / 'tokenizer.safetensors'
        backbone = load_config(first / 'config.py').model.backbone
        words = [last_checkpoint(first), '--out', out, '--tokens', number, '--seed', seed]
        if blocks := row.tokens.get('blocks'):
            backbone.update(arch=dict(backbone.arch, depth=blocks), final_norm=False)
            words += ['--blocks', blocks]
        if not out.exists():
            tool = [sys.executable, 'tools/make_tokenizer.py', first / 'config.py']
            subprocess.run([str(word) for word in [*tool, *words]], cwd=ROOT, check=True)
        generator = dict(
            _delete_=True,
            type='cae_mm.KMeansTokenizer',
            backbone=backbone.to_dict(),
            vocab_size=number,
            init_cfg=dict(type='Pretrained', checkpoint=str(out)),
        )
        return {'model.target_generator': generator, 'model.neck.out_dims': number}

    def _judge(self, row: Row, seed: int, config: Path, checkpoint: Path | str) -> dict[str, float]:
        """Accuracies of quick probes by column, in [0, 1]; what was read of a folder is kept."""
        file = config.with_name('judged.json')
        known = json.loads(file.read_text()) if file.exists() else {}
        judged = {}
        for prefix, data in [('', row.data), *((f'{k}/', v) for k, v in row.judge_on.items())]:
            asked = f'{data}: {", ".join(row.judge)}'
            if asked not in known:
                probe = QuickProbe(
                    cfg=load_config(config),
                    checkpoint=checkpoint,
                    train=ROOT / data / 'train',
                    val=ROOT / data / 'val',
                    out=config.parent / 'probe' / prefix,
                    probes=[NAMES[name][1] for name in row.judge],
                    seed=seed,
                )
                found = probe.run()['results']
                for array in probe.folder.glob('*/features.npy'):
                    array.unlink()  # hundreds of megabytes
                known[asked] = {name: pick(found, name) for name in row.judge}
                write_whole(file, json.dumps(known).encode())
            judged |= {prefix + name: accuracy for name, accuracy in known[asked].items()}
        return judged

    def _train_task(self, row: Row, seed: int, name: str, checkpoint: Path | str) -> float:
        """Train a task that begins with the encoder; return its metric, in [0, 1].

        One that was begun with other settings is removed, and trained anew.
        """
        task, folder = row.tasks[name], self.folder_of(row, seed) / name
        settings = json.dumps({key: task[key] for key in task if key != 'metric'}, sort_keys=True)
        file = folder / 'task.json'
        if file.exists() and file.read_text() != settings:
            shutil.rmtree(folder)
        write_whole(file, settings.encode())
        options = self._fill_in(task.get('options', {}), seed) | {'randomness.seed': seed}
        if checkpoint == 'random':
            options['model.backbone.init_cfg'] = None
        else:
            options['model.backbone.init_cfg.checkpoint'] = str(checkpoint)
        train(write_config(task['config'], folder, options))
        return read_metric(folder, task['metric'])

    def folder_of(self, row: Row, seed: int) -> Path:
        """Where a row is trained."""
        return self.folder / row.name.replace('/', '_') / str(seed)

    def _fill_in(self, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """Replace names of rows in braces by their checkpoints."""
        filled = dict(options)
        for key, value in options.items():
            if isinstance(value, str) and value[:1] == '{':
                filled[key] = str(last_checkpoint(self._find_folder(value[1:-1], seed)))
        return filled

    def _find_folder(self, name: str, seed: int) -> Path:
        """Where the row NAME was trained for a run of this seed."""
        return self.folder_of(self.rows[name], self._seed_of(name, seed))

    def _seed_of(self, name: str, seed: int) -> int:
        seeds = self.rows[name].seeds
        return seed if seed in seeds else seeds[0]

    def price(self, name: str, seed: int) -> float:
        """PFLOP of a finished run, with those of the rows that it needs."""
        if (name, seed) not in self.results:
            raise ValueError(f'row {name}, seed {seed}, has no result, which prices need: run it')
        needed = [self.price(other, self._seed_of(other, seed)) for other in self.rows[name].needs]
        return self.results[name, seed].get('pflop', 0.0) + sum(needed)


def training_of(what: dict[str, Any]) -> dict[str, Any]:
    """The part of ``Study.what`` that a training depends on."""
    needs = {name: training_of(other) for name, other in what.get('needs', {}).items()}
    return {key: value for key, value in what.items() if key not in JUDGING} | dict(needs=needs)


def run_all(file: Path, folder: Path) -> None:
    """Run what is missing of a table, which may grow meanwhile: it is read again before each run.

    Raises:
        ValueError: If another process runs the same study; they would share the machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f'{file} is being run by another process') from None
        while missing := (study := Study(file, folder)).find_missing():
            study.run(*missing)


def read_rows(table: dict[str, Any]) -> Iterator[Row]:
    """Rows of a table: what ``defaults`` says, then the row; ``vary`` makes a row of each value.

    ``vary: {KEY: [a, b]}`` of the row NAME gives NAME/KEY=a and NAME/KEY=b, KEY shortened to its
    last part.
    """
    for name, said in table['rows'].items():
        row = {**table.get('defaults', {}), **(said or {})}
        vary = row.pop('vary', {})
        for sequence in ('seeds', 'judge', 'against'):
            if sequence in row:
                row[sequence] = tuple(row[sequence])
        unknown = (set(row) - set(Row.__dataclass_fields__)) | (
            set(row.get('judge', ())) - set(NAMES)
        )
        if unknown:
            raise ValueError(f'row {name}: unknown {", ".join(sorted(unknown))}')
        if not vary:
            yield Row(name=name, **row)
        for key, values in vary.items():
            for value in values:
                options = {**row.get('options', {}), key: value}
                yield Row(
                    name=f'{name}/{key.rpartition(".")[2]}={value}', **row | {'options': options}
                )


def write_config(config: str | Path, folder: Path, options: dict[str, Any]) -> Path:
    """Write a config with options put in, whole, as ``config.py`` into a folder."""
    cfg = load_config(ROOT / config, options)
    cfg.work_dir = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cfg.dump(folder / 'config.py')
    return folder / 'config.py'


def train(config: Path) -> None:
    """Train a config in its folder as a user would, or go on with it."""
    output = config.with_name('output.txt')
    command = [sys.executable, 'tools/train.py', str(config.absolute()), '--resume']
    environment = os.environ | {'PYTHONWARNINGS': 'ignore'}
    with open(output, 'a') as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, env=environment)
    if done.returncode:
        raise RuntimeError(f'{config} stopped with status {done.returncode}, see {output}')


def pick(found: dict[str, Any], column: str) -> float:
    """The accuracy of a column among the results of a quick probe."""
    feature, kind, setting = NAMES[column]
    return found[feature][kind][setting]


def is_trained(folder: Path) -> bool:
    """Whether a folder holds the checkpoint of its config's last epoch."""
    config = folder / 'config.py'
    return (
        config.exists()
        and (folder / f'epoch_{load_config(config).train_cfg.max_epochs}.pth').exists()
    )


def last_checkpoint(folder: Path) -> Path:
    """Return the checkpoint that a training wrote last."""
    return folder / Path((folder / 'last_checkpoint').read_text()).name


def scalars(folder: Path) -> list[dict[str, Any]]:
    """All lines that the trainings in a folder have logged, in order."""
    files = sorted(folder.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def read_price(folder: Path, flops_per_image: float, images: int) -> dict[str, Any]:
    """What a training took: images, seconds of its steps, operations."""
    steps = [line for line in scalars(folder) if 'time' in line and 'loss' in line]
    cfg = load_config(folder / 'config.py')
    seen = images * cfg.train_cfg.max_epochs
    per_step = min(cfg.train_dataloader.batch_size, images)
    return dict(
        epochs=cfg.train_cfg.max_epochs,
        images=seen,
        seconds=round(fmean(line['time'] for line in steps) * seen / per_step, 1),
        pflop=seen * flops_per_image / 1e15,
        config=hashlib.sha256(cfg.pretty_text.encode()).hexdigest()[:12],
    )


def read_metric(folder: Path, metric: str) -> float:
    """Last value of a metric of an evaluation, as a share of 1."""
    values = [line[metric] for line in scalars(folder) if metric in line]
    if not values:
        raise ValueError(f'{folder} has no evaluation with {metric}')
    return values[-1] / 100


def find_commit() -> str:
    """The commit that is checked out, with a + if files differ from it."""

    def git(*words: str) -> str:
        command = ['git', *words]
        return subprocess.check_output(command, cwd=ROOT, text=True).strip()

    changed = git('status', '--porcelain', '--untracked-files=no', '--', 'cae_mm', 'configs')
    return git('rev-parse', '--short', 'HEAD') + ('+' if changed else '')


def split(folder: Path, out: Path) -> None:
    """Link each fifth image of a class, ordered by hash, to out/val, the others to out/train."""
    if out.exists():
        raise FileExistsError(f'{out} exists: remove it, or say another folder')
    for category in sorted(path for path in folder.iterdir() if path.is_dir()):
        images = sorted(category.iterdir(), key=lambda p: hashlib.sha256(p.name.encode()).digest())
        for i, image in enumerate(images):
            link = out / ('train' if i % HELD_OUT else 'val') / category.name / image.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(image.absolute())
    console.print(f'{out}/train and {out}/val')


def group(study: Study) -> dict[str, list[dict[str, Any]]]:
    """Results by row, in the order of the table, each ordered by seed."""
    found = sorted(study.results.values(), key=lambda result: result['seed'])
    groups = {name: [r for r in found if r['row']['name'] == name] for name in study.rows}
    return {name: results for name, results in groups.items() if results}


def columns_of(groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Names of all accuracies, in the order in which they come up."""
    return list(dict.fromkeys(name for rs in groups.values() for r in rs for name in r['accuracy']))


def spread(values: list[float]) -> str:
    """Mean and, of two or more, standard deviation, in percent; nothing of none."""
    if not values:
        return ''
    text = f'{100 * fmean(values):.1f}'
    return f'{text} ± {100 * stdev(values):.1f}' if len(values) > 1 else text


def differences(
    results: list[dict[str, Any]], others: list[dict[str, Any]], name: str
) -> list[float]:
    """Accuracy minus that of the other row with the same seed, for seeds that both have."""
    other = {r['seed']: r['accuracy'].get(name) for r in others}
    pairs = [(r['accuracy'].get(name), other.get(r['seed'])) for r in results]
    return [a - b for a, b in pairs if a is not None and b is not None]


def make_lines(study: Study) -> list[list[str]]:
    """Head and cells of the report: price and accuracies, then differences of paired rows.

    A difference is of two seeds or more, that both rows have.
    """
    groups = group(study)
    names = columns_of(groups)
    if not names:
        raise ValueError(f'{study.results_file}: nothing is judged yet')
    lines = [['row', 'seeds', 'epochs', 'PFLOP', 'with tokenizer', 'minutes', *names]]
    for row, results in groups.items():
        epochs, pflop, seconds = (
            fmean(r.get(key, 0) for r in results) for key in ('epochs', 'pflop', 'seconds')
        )
        total = fmean(study.price(row, r['seed']) for r in results)
        cells = [f'{epochs:.0f}', f'{pflop:.3f}', f'{total:.3f}', f'{seconds / 60:.0f}']
        values = [[r['accuracy'][name] for r in results if name in r['accuracy']] for name in names]
        lines.append([row, str(len(results)), *cells, *map(spread, values)])
    against = [(row, other) for row in groups for other in study.rows[row].against if row != other]
    for row, other in against:
        paired = [differences(groups[row], groups.get(other, []), name) for name in names]
        if (pairs := max(map(len, paired))) > 1:
            lines.append([f'{row} - {other}', str(pairs), *[''] * 4, *map(spread, paired)])
    return lines


def draw(study: Study, path: Path) -> None:
    """Accuracy against operations, one panel for each column.

    Rows with one name before the slash look alike.
    """
    groups = {row: results for row, results in group(study).items() if results[0]['accuracy']}
    names = columns_of(groups)
    wide = min(len(names), COLUMNS)
    high = -(-len(names) // wide)
    size = (4.2 * wide, 3.5 * high + 1)
    figure, axes = plt.subplots(high, wide, figsize=size, squeeze=False, layout='constrained')
    families = dict.fromkeys(row.partition('/')[0] for row in groups)
    every_look = product('os^Dv', plt.colormaps['tab10'].colors)  # 50 can be told apart
    looks = dict(zip(families, cycle(every_look), strict=False))
    for axis, name in zip_longest(axes.flat, names):
        if name:
            draw_panel(axis, study, groups, name, looks)
        else:
            axis.remove()
    found = [
        dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True)) for axis in figure.axes
    ]
    handles = {family: part[family] for family in families for part in found if family in part}
    figure.legend(
        handles.values(), handles.keys(), loc='outside lower center', ncols=4, fontsize='small'
    )
    figure.suptitle(study.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_panel(
    axis: Axes,
    study: Study,
    groups: dict[str, list[dict[str, Any]]],
    name: str,
    looks: dict[str, tuple[str, Any]],
) -> None:
    """One column of the report: means, bars are standard deviations.

    What was not trained, a random encoder, is a dashed line.
    """
    for row, results in groups.items():
        family = row.partition('/')[0]
        marker, colour = looks[family]
        values = [100 * r['accuracy'][name] for r in results if name in r['accuracy']]
        price = fmean(study.price(row, r['seed']) for r in results)
        if values and price:
            error = stdev(values) if len(values) > 1 else 0
            style: dict[str, Any] = dict(fmt=marker, color=colour, capsize=3)
            axis.errorbar(price, fmean(values), error, label=family, **style)
        elif values:
            axis.axhline(fmean(values), color=colour, linestyle='--', label=family)
    axis.set(xlabel='pretraining and tokenizer, PFLOP', ylabel=f'{name}, %')
    if axis.containers:  # something has a price
        axis.set_xlim(0, 1.1 * axis.dataLim.x1)
    axis.grid(alpha=0.3)


def keep_columns(study: Study, columns: list[str]) -> None:
    """Leave these accuracies of all results.

    Raises:
        ValueError: If no result has one of them.
    """
    names = columns_of(group(study))
    if absent := sorted(set(columns) - set(names)):
        raise ValueError(f'no result has {absent[0]}: columns are {", ".join(names)}')
    for result in study.results.values():
        known = result['accuracy']
        result['accuracy'] = {name: known[name] for name in columns if name in known}


def report(study: Study, markdown: Path | None, picture: Path) -> None:
    """Print the table, write it as Markdown, draw the picture."""
    lines = make_lines(study)
    table = Table(*lines[0], title=study.title)
    for cells in lines[1:]:
        table.add_row(*cells)
    console.print(table)
    if markdown:
        rows = [lines[0], ['---'] * len(lines[0]), *lines[1:]]
        markdown.write_text('\n'.join(f'| {" | ".join(cells)} |' for cells in rows) + '\n')
    draw(study, picture)
    console.print(picture)


def main() -> None:
    """Split, run or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    part = commands.add_parser('split', help='hold out a part of a labelled folder, by links')
    part.add_argument('folder', type=Path)
    part.add_argument('out', type=Path)
    run = commands.add_parser('run', help='run what is missing')
    show = commands.add_parser('report', help='show what is there')
    for part in (run, show):
        part.add_argument('table', type=Path)
        part.add_argument('--work-dir', type=Path, help='default: work_dirs/study/TABLE')
    show.add_argument('--columns', nargs='+', metavar='NAME', help='accuracies; default: all')
    show.add_argument('--markdown', type=Path, help='write the table to this file')
    show.add_argument('--picture', type=Path, help='default: report.png in the work directory')
    args = parser.parse_args()
    if args.command == 'split':
        split(args.folder, args.out)
        return
    folder = (args.work_dir or ROOT / 'work_dirs/study' / args.table.stem).absolute()
    if args.command == 'run':
        run_all(args.table, folder)
    else:
        study = Study(args.table, folder)
        if args.columns:
            keep_columns(study, args.columns)
        report(study, args.markdown, args.picture or folder / 'report.png')


if __name__ == '__main__':
    main()
