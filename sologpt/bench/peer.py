"""Another trainer with nanoGPT's command line, files and console log: the peer that this project is measured beside."""

import os
import pickle
import re

from configurator import InputError
from sologpt.bench import process
from sologpt.tokens import data_folder
from sologpt.training.runs import Run, read_run


def check_peer(folder: str) -> str:
    """The absolute path of another trainer's folder. Raises InputError if there is no train.py in it."""
    if not folder or not os.path.exists(os.path.join(folder, 'train.py')):
        raise InputError(f'peer={folder!r}: give the folder of another trainer with its train.py, such as '
                         f'--peer=../nanoGPT')
    return os.path.abspath(folder)


def link_tokens(dataset: str | None, peer: str, folder: str) -> str:
    """
    Make a data folder in `folder` that both trainers read: links to the token files of data/<dataset>, here or the
    peer's, and their description. Returns its path. Raises InputError if there are no token files.
    """
    here, there = (os.path.join(root, 'data', dataset or '') for root in ('', peer))
    source = here if os.path.exists(os.path.join(here, 'train.bin')) else there
    if not os.path.exists(os.path.join(source, 'train.bin')):
        raise InputError(f'dataset={dataset!r}: no train.bin in {here} or {there}: run its prepare.py')
    data = os.path.join(folder, 'data')
    os.mkdir(data)
    for name in os.listdir(source):
        if name.endswith('.bin') or name in ('meta.json', 'meta.pkl'):
            os.symlink(os.path.join(os.path.abspath(source), name), os.path.join(data, name))
    if not os.path.exists(os.path.join(data, 'meta.pkl')):  # without it nanoGPT assumes 50,304 ids
        with open(os.path.join(data, 'meta.pkl'), 'wb') as f:
            pickle.dump({'vocab_size': data_folder.read_meta(source)['vocab_size']}, f)
    return data


def train_peer(peer: str, args: list[str], log: str) -> tuple[Run, str]:
    """
    Run the peer's train.py, and keep its console log in the file `log`. Returns (its Run, what it printed). Raises
    InputError.
    """
    printed, _ = process.run_script(peer, 'train.py', args)
    with open(log, 'w', encoding='utf-8') as f:
        f.write(printed)
    return read_run(log, 'peer'), printed


def seed_args(peer: str, seed: int, file: str) -> list[str]:
    """
    The arguments that give the peer's train.py a seed. nanoGPT has no such key, but it runs its config files: one that
    shifts its seed is written to `file`.
    """
    with open(os.path.join(peer, 'train.py'), encoding='utf-8') as f:
        if re.search(r'^seed\b.*=', f.read(), re.M):
            return [f'--seed={seed}']
    with open(file, 'w', encoding='utf-8') as f:
        f.write(f'_manual_seed = torch.manual_seed\n'
                f'torch.manual_seed = lambda seed: _manual_seed(seed + {seed - 1})\n')
    return [file]
