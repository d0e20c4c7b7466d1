"""The page says what is in the files of runs, and nothing in them can do more than be read."""

import base64
import json
import re
import runpy
import sys
from html import unescape
from html.parser import HTMLParser
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from cae_mm.checkpoints.config_text import read_values
from cae_mm.hooks.collapse import SIGNS
from cae_mm.report.charts import BOTTOM, LEFT, MOST, RIGHT, TOP, draw_chart
from cae_mm.report.run import Run
from cae_mm.report.values import differences, flatten

EVIL = '<script>alert(1)</script>'
CONFIG = """model = dict(backbone=dict(arch='base', img_size=64), type='cae_mm.CAE')
custom_hooks = [
    dict(type='cae_mm.CollapseHook'),
    dict(type='cae_mm.NumericalFaultHook'),
    dict(type='cae_mm.UnreadableImagesHook'),
]
optim_wrapper = dict(optimizer=dict(lr=0.001, type='AdamW'))
train_cfg = dict(max_epochs=4)
"""
LOG = """2026/01/01 10:00:00 - mmengine - INFO -
------------------------------------------------------------
System environment:
    Python: 3.11
    PyTorch: 2.11.0
------------------------------------------------------------
2026/01/01 10:00:01 - mmengine - INFO - precision: bfloat16: has it
backbone.x - torch.Size([1])
2026/01/01 10:00:02 - mmengine - INFO - Epoch(train) [3][10/10]  loss: 1.0
"""


def line(step, **numbers):
    return json.dumps({**numbers, 'epoch': (step - 1) // 10 + 1, 'iter': step, 'step': step})


def make_part(work_dir, time, lines, log=LOG, config=CONFIG):
    folder = work_dir / time / 'vis_data'
    (folder / 'vis_image').mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(lines))
    (folder / 'config.py').write_text(config)
    (work_dir / time / f'{time}.log').write_text(log)
    return folder


def write(tmp_path, *arguments):
    out = tmp_path / 'out/page.html'
    with patch.object(sys, 'argv', ['report', *map(str, arguments), '--out', str(out)]):
        runpy.run_module('cae_mm.report', run_name='__main__')
    return out.read_text()


class Page(HTMLParser):
    """What a browser would make of it: tags, and attributes that load something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.lines = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.addresses += [attributes[key] for key in ('src', 'href') if attributes.get(key)]
        assert not any(key.startswith('on') for key in attributes)
        if tag == 'polyline':
            self.lines.append(attributes['points'])


def test_curves_are_the_numbers_of_the_run(tmp_path):
    values = {10: 5.0, 20: 4.25, 30: 4.5, 40: 3.0}
    lines = [line(step, loss=value) for step, value in values.items()]
    lines.insert(2, json.dumps(dict(knn_top1=0.25, step=2)))
    lines.append(json.dumps(dict(knn_top1=0.5, step=4)))
    make_part(tmp_path / 'run', '1', lines)
    run = Run(tmp_path / 'run')
    assert run.curves == {
        ('iteration', 'loss'): [*values.items()],
        ('epoch', 'knn_top1'): [(2, 0.25), (4, 0.5)],
    }
    chart = draw_chart('loss', 'iteration', [run.curves['iteration', 'loss']])
    [path] = chart.lines[0].paths
    pixels = np.array([point.split(',') for point in path.split()], float)
    x = chart.x_range[0] + (pixels[:, 0] - LEFT) / (RIGHT - LEFT) * np.diff(chart.x_range)
    y = chart.y_range[0] + (BOTTOM - pixels[:, 1]) / (BOTTOM - TOP) * np.diff(chart.y_range)
    np.testing.assert_allclose(x, [*values], atol=0.01)
    np.testing.assert_allclose(y, [*values.values()], atol=0.001)
    assert (chart.lines[0].last, chart.lines[0].best) == (3.0, (3.0, 5.0))
    assert [label for _, label in chart.y_ticks] == ['3', '3.5', '4', '4.5', '5']
    page = write(tmp_path, tmp_path / 'run')
    assert path in Page(page).lines
    assert '<b>3</b> of 3 to 5' in page and 'Accuracy of nearest neighbours' in page


def test_parts_of_a_resumed_run_are_one_curve(tmp_path):
    """What came after the checkpoint that a part began from is replaced; the last line is cut."""
    knn = [json.dumps(dict(knn_top1=epoch / 10, step=epoch)) for epoch in (1, 2)]
    make_part(tmp_path, '1', [line(10, loss=3.0), knn[0], line(20, loss=2.0), knn[1]])
    make_part(tmp_path, '2', [line(15, loss=2.5), line(20, loss=2.25), '{"loss": 1'])
    run = Run(tmp_path)
    assert run.curves['iteration', 'loss'] == [(10, 3.0), (15, 2.5), (20, 2.25)]
    assert run.curves['epoch', 'knn_top1'] == [(1, 0.1)]
    assert not run.problems and not run.finished
    assert run.progress == 'epoch 3 of 4, iteration 20'
    (tmp_path / 'epoch_4.pth').touch()
    assert Run(tmp_path).finished


def test_broken_files_are_named_once(tmp_path, capsys):
    run = tmp_path / 'run'
    folder = make_part(run, '1', ['[1]', '{"loss"', line(20, loss=2.0), line(30, loss=1.0)])
    (folder / 'config.py').write_text('model = dict(')
    (folder / 'vis_image/attention_1.png').write_text('no picture')
    (run / 'results.json').write_text('{"results": 3}')
    page = unescape(write(tmp_path, run))
    problems = capsys.readouterr().err.splitlines()
    for part in (
        'results.json is left out, it has no results of probes',
        'scalars.json, line 1 is left out',
        'scalars.json, line 2 is left out',
        'config.py cannot be read: not the config of a run: ',
        'attention_1.png is left out',
    ):
        [problem] = [problem for problem in problems if part in problem]
        assert page.count(problem) == 1
    assert len(problems) == 5
    assert 'Whether the run had a CollapseHook is not known: its config could not be read.' in page
    assert 'the run has no' not in page
    assert Run(run).curves['iteration', 'loss'] == [(20, 2.0), (30, 1.0)]


def test_folders_without_a_run_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match='is no work directory of a run: it has neither'):
        write(tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match='none has no results.json of tools/quick_probe'):
        write(tmp_path, tmp_path, '--probes', tmp_path / 'none')
    with pytest.raises(ValueError, match='the same work directory was named twice'):
        write(tmp_path, tmp_path, tmp_path)


def test_nothing_of_a_run_is_executed(tmp_path):
    """Names, texts and numbers of a run stand on the page as text; it loads nothing."""
    run = tmp_path / EVIL.replace('/', '') / 'run'
    config = (
        CONFIG + f'data = dict(root="{EVIL}")\nx = __import__("os").system("touch {tmp_path}/y")'
    )
    log = LOG + f'2026/01/01 10:00:03 - mmengine - WARNING - {EVIL}\n'
    log += f'2026/01/01 10:00:04 - mmengine - WARNING - {SIGNS[0].name} is 0.01, below {EVIL}\n'
    folder = make_part(run, '1', [json.dumps({f'loss{EVIL}': 1.0, 'step': 1})], log, config)
    sheet = Image.fromarray(np.zeros((2, 2, 3), np.uint8))
    sheet.save(folder / f'vis_image/{EVIL.replace("/", "")}"onload=_3.png')
    (run / 'unreadable.txt').write_text(f'{EVIL}\t{EVIL}\n')
    (run / 'results.json').write_text(json.dumps(make_results(EVIL, 0.5)))
    text = write(tmp_path, run)
    page = Page(text)
    assert 'script' not in page.tags and text.count('&lt;script&gt;') > 6
    assert all(address.startswith(('data:', '#')) for address in page.addresses)
    assert 'url(' not in text and '@import' not in text
    assert "default-src 'none'" in text
    assert not (tmp_path / 'y').exists()
    assert '__import__' in text  # as what it is


def make_results(checkpoint, accuracy):
    probes = dict(knn={'10': 0.25}, logreg=dict(C=1.0, accuracy=accuracy))
    return dict(
        checkpoint=checkpoint,
        folders=dict(val='photos/val'),
        images=dict(val=40),
        chance=0.1,
        results=dict(mean=probes),
    )


def test_runs_are_compared(tmp_path):
    for name, lr, accuracy, losses in (
        ('one', '0.001', 0.5, (5.0, 4.0)),
        ('two', '0.002', 0.625, (6.0, 3.0)),
    ):
        run = tmp_path / name / '0'
        lines = [line(10 * (i + 1), loss=loss) for i, loss in enumerate(losses)]
        make_part(run, '1', lines, config=CONFIG.replace('0.001', lr))
        (run / 'probe').mkdir()
        results = make_results(str(run / 'epoch_4.pth'), accuracy)
        (run / 'probe/results.json').write_text(json.dumps(results))
    (tmp_path / 'random').mkdir()
    (tmp_path / 'random/results.json').write_text(json.dumps(make_results('random', 0.2)))
    runs = [tmp_path / 'one/0', tmp_path / 'two/0']
    page = write(tmp_path, *runs, '--probes', tmp_path / 'random')
    [figure] = re.findall(r'<figure.*?</figure>', page, re.DOTALL)
    assert re.findall(r'<g class="c(\d)"><polyline points="([^"]+)', figure) == [
        ('0', f'{LEFT}.00,70.67 {RIGHT}.00,131.33'),
        ('1', f'{LEFT}.00,{TOP}.00 {RIGHT}.00,{BOTTOM}.00'),
    ]
    table = page[page.index('id="probes"') :]
    cells = [re.sub('<.*?>', '', cell) for cell in re.findall(r'<t[hd].*?</t[hd]>', table)]
    rows = [cells[i : i + 3] for i in range(0, 12, 3)]
    assert rows == [
        ['encoder', 'mean, kNN, k = 10', 'mean, logistic regression'],
        ['one', '25.0 %', '50.0 %'],
        ['two', '25.0 %', '62.5 %'],
        ['random', '25.0 %', '20.0 %'],
    ]
    assert '<td class=best>62.5 %' in table and '<td class=best>50.0 %' not in table
    [differs] = re.findall(r'<summary>1 that differ.*?</table>', page, re.DOTALL)
    assert re.findall(r'<t[hd]>(.*?)</t[hd]>', differs) == [
        *('', 'one', 'two'),
        *('optim_wrapper.optimizer.lr', '0.001', '0.002'),
    ]


def test_monitors_speak_in_words(tmp_path):
    log = LOG.replace('INFO - precision', 'WARNING - precision')
    log += ''.join(
        f'2026/01/01 10:00:0{i} - mmengine - {text}\n'
        for i, text in enumerate(
            (
                'WARNING - latent_std is 0.01, below 0.02: they are alike. What to do: stop',
                'INFO - latent_std is 0.3, above 0.02 again',
                'WARNING - align_cos is 0.01, below 0.05: nothing in common',
                'WARNING - the loss is nan at iteration 7 (epoch 1): the update is skipped; '
                "images of this process: ['a']",
                'WARNING - retry 1 of 3',
                'WARNING - retry 2 of 3',
                'WARNING - "FileClient" will be deprecated in future.',
                'WARNING - epoch 1: 2 images cannot be read, see unreadable.txt',
            )
        )
    )
    make_part(tmp_path, '1', [line(10, loss=1.0)], log)
    (tmp_path / 'faults').mkdir()
    (tmp_path / 'faults/iter_7_rank_0.json').touch()
    (tmp_path / 'unreadable.txt').write_text('a.png\tempty file\nb.png\tcut off\n')
    run = Run(tmp_path)
    assert [is_over for _, is_over in run.signs] == [True, False]
    assert run.faults == ['the loss is nan at iteration 7 (epoch 1)']
    assert [(m.text, m.count) for m in run.warnings] == [
        ('precision: bfloat16: has it', 1),
        ('retry 1 of 3', 2),
    ]
    assert run.environment == {
        'Python': '3.11',
        'PyTorch': '2.11.0',
        'precision': 'bfloat16: has it',
    }
    page = re.sub(r'\s+', ' ', unescape(write(tmp_path, tmp_path)))
    assert 'What to do: stop This is over.' in page and 'nothing in common</li>' in page
    assert '1 step has numbers that are not finite; the first: the loss is nan at iter' in page
    assert f'python tools/replay.py {tmp_path}/faults/iter_7_rank_0.json' in page
    assert '2 images could not be read and were left out; the first: a.png: empty file' in page


def test_quiet_monitors_are_praised_only_if_they_watched(tmp_path):
    make_part(tmp_path / 'watched', '1', [line(10, loss=1.0)])
    make_part(tmp_path / 'blind', '1', [line(10, loss=1.0)], config='custom_hooks = []')
    watched, blind = (write(tmp_path, tmp_path / name) for name in ('watched', 'blind'))
    said = ('No sign of collapse', 'were always finite', 'All images could be read')
    assert [[text in page for text in said] for page in (watched, blind)] == [[1] * 3, [0] * 3]
    assert blind.count('the run has no ') == 3


def test_pictures_are_in_the_page(tmp_path):
    """The last one open, before it the first and some between."""
    folder = make_part(tmp_path, '1', [line(10, loss=1.0)])
    for epoch in range(1, 21):
        image = Image.fromarray(np.full((4, 4, 3), epoch, np.uint8))
        image.save(folder / f'vis_image/attention_{epoch}.png')
    page = write(tmp_path, tmp_path)
    shown = re.findall(r'src="data:image/png;base64,(.+?)" alt="attention, epoch (\d+)', page)
    assert [int(epoch) for _, epoch in shown] == [20, 1, 5, 9, 12, 16]
    for content, epoch in shown:
        expected = folder / f'vis_image/attention_{epoch}.png'
        assert base64.b64decode(content) == expected.read_bytes()


def test_a_config_of_ours_is_compared_with_itself(tmp_path):
    """By the name of the copy that the Runner leaves; --base says another."""
    make_part(tmp_path, '1', [line(10, loss=1.0)])
    (tmp_path / 'cae_demo.py').write_text(CONFIG)
    page = write(tmp_path, tmp_path)
    assert '<th>train_cfg.max_epochs</th><td>14</td><td>4</td>' in page and '<th>base</th>' in page
    base = tmp_path / 'base.py'
    base.write_text(CONFIG.replace('64', '32') + "runner_type = 'X'\n")
    page = write(tmp_path, tmp_path, '--base', base)
    differs = page[page.index('2 that differ') : page.index('All of ')]
    assert re.findall(r'<t[hd]>(.*?)</t[hd]>', differs)[3:] == [
        *('model.backbone.img_size', '32', '64'),
        *('runner_type', 'X', ''),
    ]


def test_values_are_read_as_they_were_dumped():
    text = "a = dict(b=[dict(type='x.A', c=(1, 2)), dict(type='A'), 3], d=-1e-05)\ne = {}\n"
    assert flatten(read_values(text)) == {
        'a.b.A-0.type': 'x.A',
        'a.b.A-0.c': [1, 2],
        'a.b.A-1.type': 'A',
        'a.b.2': 3,
        'a.d': -1e-05,
        'e': {},
    }
    assert differences([{'a': (1, 2), 'b.c': 1}, {'a': [1, 2], 'd': 0}], ('b',)) == {'d': ['', 0]}


def test_long_curves_are_averaged_and_gaps_stay_gaps():
    points = [(float(i), float(i % 2)) for i in range(3 * MOST)]
    chart = draw_chart('loss', 'iteration', [points, []])
    assert chart.averaged == 3 and len(chart.lines) == 1
    assert len(chart.lines[0].paths[0].split()) == MOST
    assert chart.y_range == pytest.approx((1 / 3, 2 / 3))
    gap = [(1.0, 1.0), (2.0, float('nan')), (3.0, 2.0), (4.0, 3.0)]
    [line_] = draw_chart('loss', 'iteration', [gap]).lines
    assert [len(path.split()) for path in line_.paths] == [1, 2]
    assert draw_chart('loss', 'iteration', [[(1.0, float('nan'))]]) is None
    assert draw_chart('lr', 'iteration', [[(1.0, 5e-4)]]).y_range == pytest.approx((4.5e-4, 5.5e-4))
