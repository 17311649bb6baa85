import json
import re
import sys

import numpy as np
import pytest
import torch

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.bench.pictures import moving_mean

# Two published runs of 524,288 tokens per step. nanoGPT logs MFU of an A100's 312 TFLOP/s, whatever the GPU
PAIR = {'small': dict(n_embd=384, n_head=6, batch_size=16, gradient_accumulation_steps=32, ms=3900.0, mfu=12.9,
                      val={0: 10.95, 500: 5.5328, 1000: 4.4593}),
        'large': dict(n_embd=768, n_head=12, batch_size=8, gradient_accumulation_steps=64, ms=9340.0, mfu=15.4,
                      val={0: 10.98, 500: 5.5194})}
MODEL = ('n_embd', 'n_head', 'batch_size', 'gradient_accumulation_steps')


def write_console(path, run):
    """As nanoGPT prints it: the steps next to an evaluation hold its time, the first five have no MFU."""
    lines = [f'Overriding: {key} = {run[key]}' for key in MODEL] + ['tokens per iteration will be: 524,288']
    for i in range(0, max(run['val']) + 1, 100):
        if i in run['val']:
            lines.append(f'step {i}: train loss {run["val"][i] - 0.02:.4f}, val loss {run["val"][i]:.4f}')
        ms, mfu = run['ms'] * (4 if i in run['val'] else 1), run['mfu'] if i else -100
        lines.append(f'iter {i}: loss {9 - i / 250:.4f}, time {ms:.2f}ms, mfu {mfu:.2f}%')
    path.write_text('\n'.join(lines) + '\n')


def write_log(folder, run, **header):
    """As train.py writes log.jsonl."""
    with torch.device('meta'):
        flops = GPT(GPTConfig(n_layer=12, n_head=run['n_head'], n_embd=run['n_embd'], vocab_size=50304,
                              bias=False)).flops_per_token()
    speed = 524288 / run['ms'] * 1000
    config = {key: run[key] for key in MODEL} | {'block_size': 1024, 'n_layer': 12, 'out_dir': folder.name}
    records = [{'config': config, 'device': 'NVIDIA A100-SXM4-40GB', 'dtype': 'bfloat16',
                'parameters': 124475904,
                'flops_per_token': flops, 'peak_flops': 312e12, 'peak_source': 'datasheet, dense bfloat16; and so on',
                'tokens_per_iter': 524288} | header]
    for i in range(0, max(run['val']) + 1, 100):
        if i in run['val']:
            records.append({'iter': i, 'train_loss': run['val'][i] - 0.02, 'val_loss': run['val'][i],
                            'tokens': i * 524288, 'seconds': i * run['ms'] / 1000})
        records.append({'iter': i, 'loss': 9 - i / 250, 'time_ms': run['ms'] if i else 60000, 'tokens_per_s': speed,
                        'mfu': flops * speed / 312e12, 'memory_gb': 8 + i / 1e4, 'tokens': (i + 1) * 524288})
    folder.mkdir()
    (folder / 'log.jsonl').write_text('\n'.join(map(json.dumps, records)))


@pytest.fixture
def compare(project):
    """compare(*argv) -> (label -> cells, all that was printed, the script's globals)"""
    def run(*argv):
        namespace, out = project._in_process('compare.py', argv)
        parts = [re.split(r'\s{2,}', line.strip()) for line in out.splitlines()]
        return {label: cells for label, *cells in parts if cells}, out, namespace
    return run


@pytest.mark.parametrize('form', ['console', 'jsonl'])
def test_worked_case(compare, project, form):
    """MFU of 12.9 and 15.4 % looks low only because it is of an A100: of an RTX 4070 it is 69 and 82 %."""
    for name, run in PAIR.items():
        (write_console if form == 'console' else write_log)(project.folder / name, run)
    rows, out, _ = compare('small', 'large', '--gpu=RTX 4070', '--peak_flops=58.3e12', '--plot=')
    assert rows['ms per step'] == ['3,900 *', '9,340']
    assert rows['ms per micro-step'] == ['121.9', '145.9']  # of 16 and 8 sequences: they do not compare
    assert rows['tokens per second'] == ['134.4k *', '56.1k']
    assert rows['tokens per step = batch x block x accumulation'] == ['524,288 = 16 x 1024 x 32',
                                                                      '524,288 = 8 x 1024 x 64']
    assert rows['MFU'] == ['12.9%', '15.4% *']
    expected = ['69.0%', '82.4% *'] if form == 'console' else ['69.2%', '82.3% *']
    assert rows['MFU of RTX 4070, 58.3 TFLOP/s'] == rows['MFU of 58.3 TFLOP/s'] == expected
    assert rows['FLOPs per token'] == (['299.4M', '856.0M'] if form == 'console' else ['299.9M', '854.7M'])
    assert rows['val loss at 500 steps'] == rows['val loss at 262.1M tokens'] == ['5.5328', '5.5194 *']
    assert rows['val loss at 1,000 steps'] == ['4.4593', '-']
    # where the small one ends, at 3,900 s, the large one had evaluated only its untrained self
    assert [r for r in rows if r.endswith('of training')] == ['val loss at 4,670 s of training']
    assert rows['val loss at 4,670 s of training'] == ['-', '5.5194']
    assert rows['lowest val loss'] == ['4.4593 *', '5.5194'] and rows['at step'] == ['1,000', '500']
    assert rows['perplexity (per token)'] == ['86.43 *', '249.5']
    assert rows['final train loss'] == ['4.4393 *', '5.4994']
    assert rows['n_embd'] == ['384', '768'] and not {'block_size', 'n_layer', 'out_dir'} & rows.keys()
    assert ('max memory, GB' in rows) == ('device' in rows) == (form == 'jsonl')
    assert ('seconds are not logged in small, large' in out) == (form == 'console')
    assert ('bfloat16 is assumed' in out) == (form == 'console')


def test_common_points_are_interpolated_and_not_extrapolated(compare, project):
    for name, val in (('a', {0: 10.0, 200: 6.0, 400: 4.0, 800: 3.0}), ('b', {0: 10.0, 300: 5.0, 600: 3.5})):
        write_log(project.folder / name, PAIR['small'] | {'val': val})
    rows, out, _ = compare('a', 'b', '--plot=')
    assert rows['val loss at 300 steps ~'] == ['5.0000', '5.0000']  # equal as shown: none is best
    assert rows['val loss at 450 steps ~'] == ['3.8750 *', '4.2500']
    assert rows['val loss at 600 steps ~'] == ['3.5000', '3.5000']
    assert rows['val loss at 800 steps'] == ['3.0000', '-']
    assert sum('steps' in label for label in rows) == 4  # not at 150: b had evaluated only the untrained model
    assert rows['max memory, GB'] == ['8.1', '8.1'] and '~ interpolated' in out


def test_points_at_which_all_have_evaluated_come_first(compare, project):
    for name, every in (('a', 100), ('b', 200)):
        write_log(project.folder / name, PAIR['small'] | {'val': {i: 10 - i / 200 for i in range(0, 1201, every)}})
    rows, out, _ = compare('a', 'b', '--plot=')
    assert [label for label in rows if label.endswith('steps')] == [
        f'val loss at {n} steps' for n in ('200', '600', '800', '1,200')] and '~' not in out


def test_what_does_not_compare_is_not_marked(compare, project):
    write_log(project.folder / 'a', PAIR['small'], tokens_per_iter=1000)
    write_log(project.folder / 'b', PAIR['large'], config={'dataset': 'x'})
    write_console(project.folder / 'c.log', PAIR['large'])
    with open('c.log', 'a') as f:
        f.write("dataset = 'y'  # as in a config file\n")
    rows, out, _ = compare('a', 'b', 'c.log', '--plot=')
    assert '*' not in ''.join(rows['ms per step'] + rows['MFU'] + rows['lowest val loss'])
    assert rows['dataset'] == ['-', 'x', 'y'] and 'the datasets differ' in out
    assert rows['of TFLOP/s'] == ['312 (datasheet)', '312 (datasheet)', '312 (A100)']


def test_nanogpts_console(compare, project):
    """A config file's lines, one of them a product; a loss that is not a number; the first steps, which warm up."""
    lines = ['Overriding config with config/train_gpt2.py:', '# config for training GPT-2',
             "wandb_run_name='gpt2-124M'", 'batch_size = 12', 'block_size = 1024  # context',
             'gradient_accumulation_steps = 5 * 8', 'Overriding: device = cuda', 'Overriding: learning_rate = 0.001',
             'tokens per iteration will be: 491,520', 'number of parameters: 123.59M',
             'step 0: train loss 10.9, val loss nan', 'iter 0: loss 10.9000, time 40000.00ms, mfu -100.00%']
    lines += [f'iter {i}: loss 9.{i}, time {1000 + i}.00ms, mfu {40 if i == 3 else -100:.2f}%' for i in range(1, 4)]
    (project.folder / 'run.log').write_text('\n'.join(lines))
    rows, out, namespace = compare('run.log', '--plot=')
    assert rows['tokens per step = batch x block x accumulation'] == ['491,520 = 12 x 1024 x 40']
    assert rows['ms per step'] == ['1,002'] and rows['ms per micro-step'] == ['25.05']
    assert namespace['runs'][0].config['wandb_run_name'] == 'gpt2-124M'
    assert rows['parameters'] == ['123.59M'] and rows['MFU'] == ['40.0%'] and rows['device'] == ['cuda']
    assert rows['FLOPs per token'] == [f'{0.4 * 312e12 * 1.002 / 491520 / 1e6:.1f}M']
    assert rows['final train loss'] == ['9.3000'] and 'val loss' not in out and '*' not in out


def test_train_pys_log_and_console_agree(compare, project):
    """Which also notices when train.py's lines change."""
    _, printed = project.train(eval_interval=2, peak_flops=2e12)
    (project.folder / 'run.log').write_text(printed)
    rows, out, _ = compare('out', 'run.log')
    assert 'config, where it differs' not in out
    for label in ('device', 'dtype', 'tokens per step = batch x block x accumulation', 'lowest val loss', 'of TFLOP/s',
                  'final train loss', 'val loss at 6 steps', 'max memory, GB'):
        ours, consoles = rows[label]
        assert ours == consoles != '-', label
    assert rows['of TFLOP/s'][0] == '2 (as given by peak_flops)'
    for label in ('FLOPs per token', 'ms per step', 'tokens per second'):
        ours, consoles = (float(re.sub('[Mk* ,]', '', cell)) for cell in rows[label])
        assert ours == pytest.approx(consoles, rel=0.02), label
    assert (project.folder / 'compare.png').exists()


def test_picture(compare, project):
    from matplotlib import image
    for name in PAIR:
        write_log(project.folder / name, PAIR[name])
    _, _, namespace = compare('small', 'large', '--plot=two.png')
    pixels = image.imread('two.png')
    assert pixels.shape[1] > 1200 and pixels.std() > 0.02
    panels = namespace['figure'].axes
    assert [p.get_xlabel() for p in panels] == ['steps', 'tokens, millions', 'hours of training']
    ends = []
    for panel in panels:
        steps_small, val_small, steps_large, val_large = panel.lines
        assert val_small.get_color() == steps_small.get_color() != val_large.get_color() == steps_large.get_color()
        assert list(val_small.get_ydata()) == [10.95, 5.5328, 4.4593] and val_small.get_label() == 'small'
        assert np.allclose(steps_small.get_xdata()[[0, 5, 10]], val_small.get_xdata())  # the same steps, placed alike
        ends.append((val_small.get_xdata()[-1], val_large.get_xdata()[-1]))
    assert np.allclose(ends, [(1000, 500), (524.288, 262.144), (3900 / 3600, 4670 / 3600)])
    # a column of pixels is dark from top to bottom where a panel's left spine stands
    dark = (pixels[..., :3].max(-1) < 0.3).mean(0) > 0.7
    assert (np.diff(dark.astype(int)) == 1).sum() == 3
    legend, = namespace['figure'].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        'small', 'large', 'validation (dots: too few evaluations for a line)', 'training, smoothed']
    assert all(panel.get_title() for panel in panels) and panels[0].get_ylabel() == 'loss, nats per token'
    assert {panel.get_xscale() for panel in panels} == {'linear'}
    write_log(project.folder / 'long', PAIR['small'] | {'val': {i: 9.0 for i in range(0, 10001, 1000)}})
    panels = compare('large', 'long')[2]['figure'].axes
    assert {p.get_xscale() for p in panels} == {'symlog'}
    for panel in panels:  # step 0 is seen at the left
        assert panel.get_xlim()[0] == 0 and panel.lines[-1].get_xdata()[0] == 0
        assert np.isfinite(panel.transData.transform((0, 9.0))).all()


def test_losses_of_different_tokenizers(compare, project):
    write_log(project.folder / 'bytes', PAIR['small'], data={'vocab_size': 256, 'bytes_per_token': 1.0})
    write_log(project.folder / 'bpe', PAIR['large'], data={'vocab_size': 50257, 'bytes_per_token': 4.0})
    rows, out, namespace = compare('bytes', 'bpe')
    assert rows['lowest val loss'] == ['4.4593', '5.5194'] and 'tokenizers differ: losses per token do not' in out
    assert rows['lowest val loss, nats per byte'] == ['4.4593', f'{5.5194 / 4:.4f}']
    panel = namespace['figure'].axes[0]
    assert panel.get_ylabel() == 'loss, nats per byte' and list(panel.lines[3].get_ydata()) == [10.98 / 4, 5.5194 / 4]
    write_log(project.folder / 'unknown', PAIR['large'], data={'vocab_size': 50257})
    rows, out, namespace = compare('bytes', 'unknown')
    assert 'losses per token do not compare\n' in out and 'lowest val loss, nats per byte' not in rows
    assert 'do not compare' in namespace['figure'].axes[0].get_ylabel()


def test_the_training_loss_is_smoothed_only_if_it_has_many_steps():
    assert moving_mean([1.0, 2.0, 6.0], 1) == [1.0, 2.0, 6.0]
    assert moving_mean([1.0, 2.0, 6.0, 4.0], 2) == [1.0, 1.5, 4.0, 5.0]


def test_without_matplotlib_the_table_is_still_printed(compare, project, monkeypatch):
    write_console(project.folder / 'a.log', PAIR['small'])
    for name in [n for n in sys.modules if n.split('.')[0] == 'matplotlib'] + ['matplotlib']:
        monkeypatch.setitem(sys.modules, name, None)
    rows, out, _ = compare('a.log')
    assert rows['tokens per second'] == ['134.4k'] and 'matplotlib is not installed' in out
    assert not (project.folder / 'compare.png').exists()


def test_figures_as_json(compare, project):
    for name in PAIR:
        write_console(project.folder / name, PAIR[name])
    compare('small', 'large', '--dest=figures.json', '--plot=')
    saved = json.loads((project.folder / 'figures.json').read_text())
    assert saved['command'] == 'python compare.py small large --dest=figures.json --plot='
    assert saved['figures']['speed']['ms per micro-step'] == {'small': 121.875, 'large': 145.9375}
    assert saved['figures']['loss']['val loss at 1,000 steps'] == {'small': 4.4593, 'large': None}


def test_runs_of_the_same_name_can_be_told_apart(compare, project):
    for folder in ('x', 'y'):
        (project.folder / folder).mkdir()
        write_log(project.folder / folder / 'out', PAIR['small'])
    write_console(project.folder / 'run.log', PAIR['small'])
    names = compare('x/out', 'y/out/log.jsonl', 'y/out/', 'run.log', '--plot=')[2]['names']
    assert names == ['x/out', 'out (2)', 'out (3)', 'run.log']
    assert compare('x/out', 'run.log', '--plot=')[2]['names'] == ['out', 'run.log']


@pytest.mark.parametrize('argv, message', [
    ([], 'no runs given'), (['nothere'], 'no log nothere'), (['data'], r'no log data.log\.jsonl'),
    (['empty.log'], 'empty.log: no training step'), (['header'], 'no training step'),
    (['a.log', '--gpu=RTX 4071'], "gpu='RTX 4071' is not in the table"), (['a.log', '--peak_flops=0'], 'above 0'),
    (['a.log', '--plot=no/where.png'], 'plot=no/where.png'), (['a.log', '--dest=data'], 'dest=data: that is a folder'),
    (['a.log', '--plot=a.gif'], 'must end in .png'), (['a.log', '--plots=x'], "did you mean 'plot'"),
])
def test_refuses(compare, project, argv, message):
    write_console(project.folder / 'a.log', PAIR['small'])
    (project.folder / 'empty.log').write_text('step 0: train loss 1.0, val loss 1.0\n')
    (project.folder / 'header').mkdir()
    (project.folder / 'header' / 'log.jsonl').write_text('{"config": {}}\n')
    with pytest.raises(InputError, match=message):
        compare(*argv)
    assert not (project.folder / 'compare.png').exists()
