"""benchmarks/study.py: a table of runs, what is run of it, and what is reported."""

import importlib
import json
import shutil

import pytest
import yaml
from builders import ROOT, make_images
from PIL import Image

CLASSES = dict(dark=60, bright=250)


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    return importlib.import_module('study')


def write_table(folder, rows, **defaults):
    table = dict(title='T', rows=rows)
    table['defaults'] = dict(config='configs/demo/cae_demo.py', data=str(folder)) | defaults
    (folder / 'table.yml').write_text(yaml.safe_dump(table, sort_keys=False))
    return folder / 'table.yml'


def add_result(study, file, name, seed, **accuracy):
    read = study.Study(file, file.parent)
    line = dict(
        row=read.what(read.rows[name]),
        seed=seed,
        pflop=2.0,
        epochs=3,
        seconds=60,
        accuracy=accuracy,
    )
    with open(file.with_suffix('.jsonl'), 'a') as results:
        results.write(json.dumps(line) + '\n')
    folder = read.folder_of(read.rows[name], seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.py').write_text('train_cfg = dict(max_epochs=3)')
    (folder / 'epoch_3.pth').touch()


def test_rows_are_defaults_and_their_own_and_vary(study, tmp_path):
    vary = {'model.head.align_weight': [0, 2]}
    rows = dict(a=dict(seeds=[0, 1]), b=dict(options={'x': 1}, vary=vary, pflop=3))
    read = study.Study(write_table(tmp_path, rows, pflop=1), tmp_path).rows
    assert list(read) == ['a', 'b/align_weight=0', 'b/align_weight=2']
    assert (read['a'].pflop, read['a'].seeds, read['a'].options) == (1, (0, 1), {})
    b = read['b/align_weight=2']
    assert b.pflop == 3 and b.options == {'x': 1, 'model.head.align_weight': 2}


def test_bad_tables_are_refused(study, tmp_path):
    with pytest.raises(ValueError, match='row a: unknown epoch'):
        study.Study(write_table(tmp_path, dict(a=dict(epoch=3))), tmp_path)
    with pytest.raises(ValueError, match='row a: unknown knm'):
        study.Study(write_table(tmp_path, dict(a=dict(judge=['knm']))), tmp_path)
    with pytest.raises(ValueError, match='row a needs b, but no row before it is that'):
        study.Study(write_table(tmp_path, dict(a=dict(options={'k': '{b}'}), b={})), tmp_path)
    untrained = dict(a=dict(pflop=0), b=dict(tokens=dict(of='a', number=8)))
    with pytest.raises(ValueError, match='row b needs a, but that has pflop: 0 and no checkpoint'):
        study.Study(write_table(tmp_path, untrained), tmp_path)
    twice = dict(a=dict(vary={'model.neck.depth': [1, 2], 'model.head.depth': [1]}))
    with pytest.raises(ValueError, match='two rows are called a/depth=1, give one another name'):
        study.Study(write_table(tmp_path, twice), tmp_path)
    file = write_table(tmp_path, dict(a={}))
    with pytest.raises(ValueError, match='nothing is judged yet'):
        study.make_lines(study.Study(file, tmp_path))
    with pytest.raises(ValueError, match='row a is against c, but no row is that'):
        study.Study(write_table(tmp_path, dict(a=dict(against=['c']))), tmp_path)
    file.write_text(file.read_text().replace('title: T', 'title: T\nreference: a'))
    with pytest.raises(ValueError, match='table.yml: unknown reference'):
        study.Study(file, tmp_path)


def test_first_seeds_first_and_finished_runs_never_again(study, tmp_path):
    file = write_table(tmp_path, dict(a=dict(seeds=[0, 1]), b=dict(seeds=[0, 1])))
    order = []
    while missing := study.Study(file, tmp_path).find_missing():
        order.append((missing[0].name, missing[1]))
        add_result(study, file, *order[-1], knn=0.5)
    assert order == [('a', 0), ('b', 0), ('a', 1), ('b', 1)]


def test_a_run_waits_for_the_one_that_it_needs(study, tmp_path):
    rows = dict(
        a=dict(seeds=[0, 1]),
        b=dict(seeds=[1], options={'k': '{a}'}),
        c=dict(seeds=[1], options={'k': '{b}'}),
    )
    file = write_table(tmp_path, rows)
    order = []
    while missing := study.Study(file, tmp_path).find_missing():
        order.append((missing[0].name, missing[1]))
        add_result(study, file, *order[-1], knn=0.5)
    assert order == [('a', 0), ('a', 1), ('b', 1), ('c', 1)]


def test_what_a_run_needs_is_trained_again_where_only_its_result_is_there(study, tmp_path):
    rows = dict(dvae={}, a=dict(options={'k': '{dvae}'}))
    file = write_table(tmp_path, rows)
    add_result(study, file, 'dvae', 0)
    add_result(study, file, 'a', 0, knn=0.5)
    shutil.rmtree(tmp_path / 'dvae')  # as in a copy of the repository
    assert study.Study(file, tmp_path).find_missing() is None

    rows['b'] = rows['a']
    file = write_table(tmp_path, rows)
    assert study.Study(file, tmp_path).find_missing()[0].name == 'dvae'
    add_result(study, file, 'dvae', 0)
    (tmp_path / 'dvae/0/epoch_3.pth').rename(tmp_path / 'dvae/0/epoch_2.pth')  # not to its end
    assert study.Study(file, tmp_path).find_missing()[0].name == 'dvae'
    add_result(study, file, 'dvae', 0)
    assert study.Study(file, tmp_path).find_missing()[0].name == 'b'
    add_result(study, file, 'b', 0, knn=0.5)

    shutil.rmtree(tmp_path / 'dvae')
    rows['a'] = rows['a'] | dict(judge=['knn'])  # its config is written anew, with that checkpoint
    file = write_table(tmp_path, rows)
    assert study.Study(file, tmp_path).find_missing()[0].name == 'dvae'


def test_a_row_that_changed_since_it_was_run_is_no_result(study, tmp_path):
    file = write_table(tmp_path, dict(a=dict(pflop=1)))
    add_result(study, file, 'a', 0, knn=0.5)
    file.write_text(file.read_text().replace('pflop: 1', 'pflop: 2'))
    with pytest.raises(ValueError, match='row a is not what was run as seed 0 in .*table.jsonl'):
        study.Study(file, tmp_path).find_missing()
    file.write_text(file.read_text().replace('seeds', 'x').replace('pflop: 2', 'pflop: 1'))
    assert study.Study(file, tmp_path).find_missing() is None


def test_a_row_changes_with_what_it_needs_and_never_goes_on_with_another_training(study, tmp_path):
    rows = dict(dvae=dict(pflop=1), cae=dict(options={'k': '{dvae}'}))
    file = write_table(tmp_path, rows)
    add_result(study, file, 'cae', 0, knn=0.5)
    before = study.Study(file, tmp_path)
    before._claim_folder(before.rows['cae'], 0)
    before._claim_folder(before.rows['cae'], 0)  # goes on
    file.write_text(file.read_text().replace('pflop: 1', 'pflop: 2'))
    after = study.Study(file, tmp_path)
    assert before.what(before.rows['cae']) != after.what(after.rows['cae'])
    with pytest.raises(ValueError, match='cae/0 has a training of another row cae: remove it'):
        after._claim_folder(after.rows['cae'], 0)


def test_a_finished_training_is_judged_anew_where_its_protocols_change(study, tmp_path):
    rows = dict(dvae=dict(judge=[]), cae=dict(options={'k': '{dvae}'}, judge=['knn']))
    file = write_table(tmp_path, rows)
    for name in rows:
        add_result(study, file, name, 0, knn=0.5)
    before = study.Study(file, tmp_path)
    before._claim_folder(before.rows['cae'], 0)
    rows['cae']['tasks'] = {'fine-tuning': dict(config='c.py', metric='accuracy/top1')}
    after = study.Study(write_table(tmp_path, rows), tmp_path)
    assert after.find_missing() == (after.rows['cae'], 0)
    after._claim_folder(after.rows['cae'], 0)  # not another training
    add_result(study, file, 'cae', 0, knn=0.6)
    rows['dvae']['judge'] = ['knn']  # nothing to those that need it
    last = study.Study(write_table(tmp_path, rows), tmp_path)
    assert last.results['cae', 0]['accuracy'] == dict(knn=0.6)  # the line written last
    assert last.find_missing() == (last.rows['dvae'], 0)


def test_braces_are_the_checkpoint_of_a_row(study, tmp_path):
    rows = dict(tokens=dict(seeds=[0, 1]), a=dict(seeds=[0, 1, 2], options={'k': '{tokens}'}))
    read = study.Study(write_table(tmp_path, rows), tmp_path / 'runs')
    for seed in (0, 1):
        folder = read.folder_of(read.rows['tokens'], seed)
        folder.mkdir(parents=True)
        (folder / 'last_checkpoint').write_text('/moved/since/epoch_3.pth')
    options = [read._fill_in(read.rows['a'].options, seed)['k'] for seed in (0, 1, 2)]
    runs = tmp_path / 'runs/tokens'
    assert options == [f'{runs}/{seed}/epoch_3.pth' for seed in (0, 1, 0)]


def test_what_a_run_needs_is_in_its_price(study, tmp_path):
    tokens = dict(of='first', number=512)
    rows = dict(
        dvae={}, first=dict(options={'k': '{dvae}'}), second=dict(tokens=tokens, seeds=[0, 1])
    )
    file = write_table(tmp_path, rows)
    for name, seed in (('first', 0), ('dvae', 0), ('second', 1)):
        add_result(study, file, name, seed, knn=0.5)
    read = study.Study(file, tmp_path)
    assert [read.price(*run) for run in (('dvae', 0), ('first', 0), ('second', 1))] == [2, 4, 6]
    with pytest.raises(ValueError, match='row second, seed 0, has no result'):
        read.price('second', 0)


def test_probes_are_read_once_of_a_folder_of_images(study, tmp_path, monkeypatch):
    read = []

    class Probe:
        def __init__(self, *, val, out, **rest):
            self.val, self.folder = val, out

        def run(self):
            read.append(self.val.parent.name)
            return dict(results=dict(mean=dict(knn={20: len(read) / 10})))

    monkeypatch.setattr(study, 'QuickProbe', Probe)
    monkeypatch.setattr(study, 'load_config', lambda config: None)
    for judge_on in ({}, dict(a='one'), dict(b='two', a='one')):
        rows = dict(cae=dict(judge=['knn'], judge_on=judge_on))
        table = study.Study(write_table(tmp_path, rows, data='own'), tmp_path / 'runs')
        judged = table._judge(table.rows['cae'], 0, tmp_path / 'config.py', 'random')
    assert read == ['own', 'one', 'two']
    assert judged == {'knn': 0.1, 'a/knn': 0.2, 'b/knn': 0.3}
    assert list(judged) == ['knn', 'b/knn', 'a/knn']


def test_a_task_that_changed_is_trained_anew(study, tmp_path, monkeypatch):
    def train(config):
        """A finished training, gone on with, trains and logs nothing."""
        log = config.parent / '1/vis_data/scalars.json'
        if not log.exists():
            log.parent.mkdir(parents=True)
            weight_decay = study.load_config(config).optim_wrapper.optimizer.weight_decay
            log.write_text(json.dumps({'mIoU': 100 * weight_decay}))

    monkeypatch.setattr(study, 'train', train)
    config = 'configs/imagenette/vit-micro-p8_cae-pre_1xb64-coslr-3e_imagenette-64px.py'
    for decay in (0.25, 0.5):
        options = {'optim_wrapper.optimizer.weight_decay': decay}
        tasks = {'a': dict(config=config, options=options, metric='mIoU')}
        table = study.Study(write_table(tmp_path, dict(cae=dict(tasks=tasks))), tmp_path / 'runs')
        for _ in range(2):
            assert table._train_task(table.rows['cae'], 0, 'a', 'random') == decay


def test_report_has_spread_and_differences_by_seed(study, tmp_path):
    three = dict(seeds=[0, 1, 2])
    rows = dict(ref=three, other=three, once=dict(seeds=[1]), later={})
    file = write_table(tmp_path, rows)
    for seed, (ref, other) in enumerate([(0.50, 0.54), (0.60, 0.62)]):
        add_result(study, file, 'ref', seed, knn=ref, logreg=0.7)
        add_result(study, file, 'other', seed, knn=other)
    add_result(study, file, 'other', 2, knn=0.9)  # ref has not this seed
    add_result(study, file, 'once', 1, knn=0.9)  # a difference without a spread says nothing
    rows['other'] = three | dict(against=['ref', 'once', 'later'])
    table = study.Study(write_table(tmp_path, rows, against=['ref']), tmp_path)
    assert table.find_missing() == (table.rows['later'], 0)  # nothing is run again for `against`
    head, ref, other, once, paired = study.make_lines(table)
    assert head[6:] == ['knn', 'logreg']
    assert ref == ['ref', '2', '3', '2.000', '2.000', '1', '55.0 ± 7.1', '70.0 ± 0.0']
    assert other == ['other', '3', '3', '2.000', '2.000', '1', '68.7 ± 18.9', '']
    assert once == ['once', '1', '3', '2.000', '2.000', '1', '90.0', '']
    assert paired == ['other - ref', '2', '', '', '', '', '3.0 ± 1.4', '']
    study.report(study.Study(file, tmp_path), tmp_path / 'table.md', tmp_path / 'x.png')
    assert '| ref | 2 | 3 | 2.000 | 2.000 | 1 | 55.0 ± 7.1 |' in (tmp_path / 'table.md').read_text()
    with Image.open(tmp_path / 'x.png') as picture:
        assert picture.width > 400


def test_picture_has_a_panel_for_each_column_and_a_look_for_each_family(
    study, tmp_path, monkeypatch
):
    rows = {'start': dict(pflop=0), 'ref/slow': {}, 'ref/fast': {}, 'other': {}}
    file = write_table(tmp_path, rows)
    columns = dict.fromkeys(['knn', 'logreg', 'linear', 'attentive', 'upernet'], 0.5)
    for row in rows:
        add_result(study, file, row, 0, **columns)
    results = [json.loads(line) for line in file.with_suffix('.jsonl').read_text().splitlines()]
    results[0].pop('pflop')  # not trained
    file.with_suffix('.jsonl').write_text('\n'.join(map(json.dumps, results)))
    monkeypatch.setattr(study.plt, 'close', lambda figure: None)
    study.draw(study.Study(file, tmp_path), tmp_path / 'x.png')
    figure = study.plt.gcf()
    assert [axis.get_ylabel() for axis in figure.axes] == [f'{name}, %' for name in columns]
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ['start', 'ref', 'other']
    panel = figure.axes[0]
    [start] = [line for line in panel.lines if line.get_linestyle() == '--']
    assert list(start.get_ydata()) == [50, 50]
    slow, fast, other = (points.lines[0].get_color() for points in panel.containers)
    assert slow == fast != other


def test_report_of_some_columns(study, tmp_path):
    file = write_table(tmp_path, dict(a={}, b={}))
    add_result(study, file, 'a', 0, knn=0.5, linear=0.6, attentive=0.7)
    add_result(study, file, 'b', 0, knn=0.4)
    table = study.Study(file, tmp_path)
    with pytest.raises(ValueError, match='no result has mIoU: columns are knn, linear, attentive'):
        study.keep_columns(table, ['knn', 'mIoU'])
    study.keep_columns(table, ['attentive', 'knn'])
    head, a, b = study.make_lines(table)
    assert (head[6:], a[6:], b[6:]) == (['attentive', 'knn'], ['70.0', '50.0'], ['', '40.0'])


def test_picture_of_what_was_not_trained(study, tmp_path):
    file = write_table(tmp_path, {'random': dict(pflop=0)})
    add_result(study, file, 'random', 0, knn=0.5)
    [result] = map(json.loads, file.with_suffix('.jsonl').read_text().splitlines())
    file.with_suffix('.jsonl').write_text(json.dumps(result | dict(pflop=0.0)))
    study.draw(study.Study(file, tmp_path), tmp_path / 'x.png')
    assert (tmp_path / 'x.png').is_file()


def test_a_fifth_of_each_class_is_held_out(study, tmp_path):
    make_images(tmp_path / 'all', CLASSES, 10)
    study.split(tmp_path / 'all', tmp_path / 'out')
    for name in CLASSES:
        parts = [
            {p.name for p in (tmp_path / 'out' / s / name).iterdir()} for s in ('train', 'val')
        ]
        assert [len(part) for part in parts] == [8, 2] and not parts[0] & parts[1]
    with pytest.raises(FileExistsError, match='out exists'):
        study.split(tmp_path / 'all', tmp_path / 'out')


def test_a_run_is_trained_at_its_price_judged_and_kept(study, tmp_path):
    for part, count in (('train', 20), ('val', 5)):
        make_images(tmp_path / part, CLASSES, count)
    make_images(tmp_path / 'other/train', CLASSES, 20)
    make_images(tmp_path / 'other/val', dict(dark=250, bright=60), 5)  # the other way round
    options = {
        'model.target_generator': dict(_delete_=True, type='cae_mm.RGBTarget'),
        'model.neck.out_dims': 192,
        'model.backbone.arch': dict(
            _delete_=True, embed_dims=64, depth=1, num_heads=1, layer_scale=0.1
        ),
        'model.neck.in_dims': 64,
        'train_dataloader.batch_size': 20,
        'settings.transforms.TwoViewResizedCrop.second_size': None,
    }
    arch = 'model.backbone.arch'
    head = {'model.head.in_channels': 64, 'model.head.num_classes': 2, 'val_evaluator.topk': [1]}
    finetuning = dict(
        config='configs/imagenette/vit-micro-p8_cae-pre_1xb64-coslr-3e_imagenette-64px.py',
        options={'settings.data_root': str(tmp_path), arch: options[arch]}
        | {'train_dataloader.batch_size': 20, 'model.data_preprocessor.num_classes': 2}
        | head,
        metric='accuracy/top1',
    )
    rows = dict(
        random=dict(pflop=0, judge=['knn', 'attentive'], judge_on=dict(other=f'{tmp_path}/other')),
        cae=dict(pflop=3e-5, tasks=dict(finetuning=finetuning)),
        second=dict(pflop=3e-5, tokens=dict(of='cae', number=16)),
    )
    file = write_table(tmp_path, rows, options=options, judge=['knn'])
    study.run_all(file, tmp_path / 'runs')
    random, cae, second = map(json.loads, file.with_suffix('.jsonl').read_text().splitlines())
    found = random['accuracy']
    assert 'pflop' not in random
    assert found.keys() == {'knn', 'attentive', 'other/knn', 'other/attentive'}
    assert (found['knn'], found['other/knn']) == (1, 0)
    assert set(cae['accuracy']) == {'knn', 'finetuning'}
    assert all(0 <= accuracy <= 1 for accuracy in cae['accuracy'].values())
    task = tmp_path / 'runs/cae/0/finetuning'
    assert f"'{tmp_path}/runs/cae/0/epoch_2.pth'" in (task / 'config.py').read_text()
    assert cae['epochs'] == 2 and cae['images'] == 80 and cae['seconds'] > 0
    assert cae['pflop'] == pytest.approx(3e-5, rel=0.25)  # half an epoch
    assert set(second['accuracy']) == {'knn'}
    assert 'token_acc' in study.scalars(tmp_path / 'runs/second/0')[0]
    assert not list((tmp_path / 'runs').rglob('features.npy'))
    trained = (tmp_path / 'runs/cae/0/last_checkpoint').stat().st_mtime_ns
    study.run_all(file, tmp_path / 'runs')  # nothing is missing
    assert (tmp_path / 'runs/cae/0/last_checkpoint').stat().st_mtime_ns == trained
