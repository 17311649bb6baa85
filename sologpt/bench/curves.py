"""The picture of compare.py: the losses of several runs against steps, tokens and time."""

import math

from sologpt.bench.pictures import moving_mean, style_axes
from sologpt.training.runs import Run

UNITS = {  # axis of a Run -> (size of the unit, label); the largest unit that the longest run reaches is used
    'iter': ((1, 'steps'),),
    'tokens': ((1e9, 'tokens, billions'), (1e6, 'tokens, millions'), (1e3, 'tokens, thousands'),
               (1, 'tokens')),
    'seconds': ((3600, 'hours of training'), (60, 'minutes of training'), (1, 'seconds of training'))}
TITLES = {'iter': 'loss per step', 'tokens': 'loss per token read', 'seconds': 'loss per time'}
FEW = 5  # evaluations: a line between fewer would not be the run's course, because the first is the untrained model's
SMOOTHED = 30  # a training loss is averaged over this share of its logged steps, so that noise hides nothing


def loss_scales(runs: list[Run]) -> tuple[list[float], str]:
    """
    (by what each run's losses are divided, their unit in words). Losses of different tokenizers compare in nats per
    byte, if every log tells how many bytes a token has.
    """
    if not tokenizers_differ(runs):
        return [1.0] * len(runs), 'nats per token'
    scales = [run.bytes_per_token for run in runs]
    if all(scales):
        return scales, 'nats per byte'
    return [1.0] * len(runs), 'nats per token;\nthe tokenizers differ, so the heights do not compare'


def tokenizers_differ(runs: list[Run]) -> bool:
    """Whether the logs tell that the runs have read tokens of different vocabularies."""
    return len({run.vocab_size for run in runs if run.vocab_size}) > 1


def draw_curves(figure, runs: list[Run]) -> None:
    """Validation losses thick, training losses thin, in a panel for each axis."""
    from matplotlib.lines import Line2D
    scales, unit = loss_scales(runs)
    panels = figure.subplots(1, 3, sharey=True)
    for panel, axis in zip(panels, UNITS, strict=True):
        _draw_panel(panel, runs, axis, scales)
    if min(len(run.evals) for run in runs) >= FEW:  # then the first fall is not what is to be seen
        later = [e['val_loss'] / scale for run, scale in zip(runs, scales, strict=True)
                 for e in run.evals[1 + len(run.evals) // 10:]]
        low, high = min(later), max(later)
        panels[0].set_ylim(top=high + max(0.15 * (high - low), 0.02 * high))
    panels[0].set_ylabel(f'loss, {unit}')
    handles, labels = panels[0].get_legend_handles_labels()
    few = any(len(run.evals) < FEW for run in runs)
    handles += [Line2D([], [], color='black', linewidth=2, marker='o' if few else None, markersize=4),
                Line2D([], [], color='black', linewidth=0.7, alpha=0.6)]
    labels += ['validation' + ' (dots: too few evaluations for a line)' * few, 'training, smoothed']
    figure.legend(handles, labels, loc='outside upper center', ncols=min(len(labels), 6), frameon=False)


def _draw_panel(panel, runs, axis, scales):
    curves = [(run.place(axis), run.curve(axis)) for run in runs]
    ends = [max([*xs, *(() if steps is None else steps)], default=0) for steps, (xs, _) in curves]
    unit, label = next((unit for unit in UNITS[axis] if max(ends) >= unit[0]), UNITS[axis][-1])
    for i, (run, scale, (steps, (xs, losses))) in enumerate(zip(runs, scales, curves, strict=True)):
        few = len(xs) < FEW
        if steps is not None:
            smooth = moving_mean([step['loss'] / scale for step in run.steps], max(1, len(run.steps) // SMOOTHED))
            panel.plot(steps / unit, smooth, color=f'C{i}', linewidth=1.2 if few else 0.7, alpha=0.8 if few else 0.4)
        panel.plot([x / unit for x in xs], [loss / scale for loss in losses], color=f'C{i}', label=run.name,
                   linewidth=0 if few else 2, marker='o' if few or len(xs) <= 30 else None, markersize=4)
    known = [end for end in ends if end]
    if known and max(known) > 8 * min(known):  # on a linear axis the short run would be a stroke at the left
        first = min((x for _, (xs, _) in curves for x in xs if x > 0), default=min(known)) / unit
        linear_to = 10 ** math.ceil(math.log10(first))  # so that step 0 is seen
        panel.set_xscale('symlog', linthresh=linear_to, linscale=0.6)
        panel.xaxis.set_major_formatter('{x:g}')
        label += ' (log)'
    panel.set_xlim(left=0)
    style_axes(panel, TITLES[axis], label)
