"""What a checkpoint may and may not decide when a run goes on from it."""

import os
import shutil

import pytest
import torch
from conftest import TINY

from configurator import InputError
from sologpt.files.checkpoint import read_checkpoint
from sologpt.training.progress import Progress
from sologpt.training.resume import resume


def change_config(path, **changes):
    saved = torch.load(path, weights_only=True)
    saved['config'] |= changes
    torch.save(saved, path)


@pytest.fixture
def trap(project):
    """A folder outside of data/ with a prepare.py that leaves a trace, beside a run of which the data is gone."""
    project.train(max_iters=3)
    os.makedirs('evil/run')
    for folder in ('evil/run', 'data/trap'):
        os.makedirs(folder, exist_ok=True)
        with open(f'{folder}/prepare.py', 'w', encoding='utf-8') as f:
            f.write("open('executed', 'w').close()\n")
    shutil.copy('data/tiny/meta.json', 'data/trap')
    return project


@pytest.mark.parametrize('dataset', ['../evil/run', '..', 'sub/../../evil/run', os.path.abspath(os.sep)])
def test_a_checkpoint_may_not_name_a_path(trap, dataset):
    change_config('out/ckpt.pt', prepare_data=True, dataset=dataset)
    with pytest.raises(InputError, match='a checkpoint may only name a folder in data/'):
        trap.resume(max_iters=9)
    assert not os.path.exists('executed')


def test_a_checkpoint_runs_no_script(trap):
    change_config('out/ckpt.pt', prepare_data=True, dataset='trap')
    with pytest.raises(InputError, match='no train.bin in data/trap'):
        trap.resume(max_iters=9)
    assert not os.path.exists('executed')
    with pytest.raises(InputError):  # the script is run if the user asks for it now
        trap.resume(max_iters=9, prepare_data=True)
    assert os.path.exists('executed')


def test_a_dataset_that_is_a_path_may_be_given_now(trap):
    change_config('out/ckpt.pt', dataset='../evil/run')
    ran, _ = trap.resume(max_iters=4, dataset='tiny')
    assert ran['progress'].iter_num == 4


def test_a_checkpoint_uses_no_account(project):
    project.train(max_iters=3)
    change_config('out/ckpt.pt', wandb_log=True, wandb_project="someone's", wandb_run_name='x')
    ran, _ = project.resume(max_iters=4)
    assert not ran['wandb_log'] and ran['report'].log.wandb_run is None and not os.path.exists('wandb')


def test_keys_that_are_taken_over(project):
    project.train(max_iters=3, dropout=0.1, seed=7)
    config = {'init_from': 'resume', 'out_dir': 'out', 'sharding': '', 'eval_only': False, 'max_iters': 9,
              'total_batch_size': None, 'gradient_accumulation_steps': None, 'train_minutes': 0.0}
    namespace = {'__file__': project.command('train.py')[1]}
    run = resume(namespace, config, ['init_from', 'max_iters'])
    assert run and run.saved['iter_num'] == 3
    assert namespace['dropout'] == 0.1 and namespace['seed'] == 7 and namespace['max_iters'] == 9
    assert 'device' not in namespace and 'prepare_data' not in namespace


@pytest.mark.parametrize('given, kept, dropped', [
    (['total_batch_size', 'gradient_accumulation_steps'], 'gradient_accumulation_steps', 'total_batch_size'),
    (['gradient_accumulation_steps', 'total_batch_size'], 'total_batch_size', 'gradient_accumulation_steps')])
def test_of_two_sizes_of_the_step_the_later_one_counts(given, kept, dropped):
    config = {'init_from': 'scratch', 'total_batch_size': 64, 'gradient_accumulation_steps': 4}
    namespace = dict(config)
    assert not resume(namespace, config, given)
    assert config[kept] is not None and config[dropped] is None and namespace[dropped] is None


def test_progress_of_nanogpts_checkpoints_and_of_lost_patience(project):
    progress = Progress.from_saved({'iter_num': 8, 'best_val_loss': torch.tensor(1.5)}, patience=0)
    assert progress == Progress(iter_num=8, best_val_loss=1.5, best_iter=8)
    assert Progress.from_saved({'iter_num': 8, 'evals_since_best': 3}, patience=3).evals_since_best == 0
    assert progress.add_evaluation(1.4) and not progress.add_evaluation(1.6)
    assert (progress.best_val_loss, progress.best_iter, progress.evals_since_best) == (1.4, 8, 1)
    project.train(**{key: TINY[key] for key in ('max_iters',)})
    saved = read_checkpoint('out/ckpt.pt')
    assert Progress.from_saved(saved, 0).to_save(0.0).items() <= saved.items()
