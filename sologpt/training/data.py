"""The data of a run: the folder data/<dataset>, prepared if asked, and its two splits."""

import glob
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np

from configurator import InputError
from sologpt.machine import processes
from sologpt.tokens import data_folder, tokenizer
from sologpt.tokens.loader import Tokens


@dataclass
class Data:
    name: str  # the folder in data/
    folder: str
    meta: dict  # what it says of itself: see data_folder.read_meta
    n_ids: int = 0  # ids that may occur
    train: Tokens | None = None
    val: Tokens | None = None

    def open_tokens(self, block_size: int, vocab_size: int) -> None:
        """
        Open both splits in windows of block_size tokens, for a model with vocab_size ids. Raises InputError if the data
        has ids that the model does not have.
        """
        assumed = self.meta is data_folder.ASSUMED_META  # the ids themselves are checked as they are read
        if vocab_size < self.meta['vocab_size'] and not assumed:
            raise InputError(f'{self.folder} has {self.meta["vocab_size"]} ids, the model only {vocab_size}')
        self.n_ids = min(self.meta['vocab_size'], vocab_size)
        self.train, self.val = (Tokens(self.folder, split, self.meta, block_size, self.n_ids)
                                for split in ('train', 'val'))

    def eot(self) -> int | None:
        """The id with which a document begins, if there is one: see GPTConfig.document_eot."""
        return tokenizer.document_begin_of(self.meta['tokenizer'])

    def bytes_per_token(self) -> float | None:
        """
        Bytes of text in a token, on average over the first of the validation split; None if the tokenizer would have to
        be downloaded. Losses of different tokenizers compare per byte.
        """
        described = self.meta['tokenizer']
        if described['kind'] == 'tiktoken' and 'ranks' not in described:
            return None
        ids = np.fromfile(self.val.paths[0], self.val.dtype, count=2 ** 14).tolist()
        return len(self.tokenizer().to_bytes(ids)) / len(ids)

    def to_save(self) -> dict:
        """What a checkpoint says of the data."""
        return {'tokenizer': self.meta['tokenizer'], 'data': {'name': self.name, 'source': self.meta.get('source', '')}}

    def tokenizer(self):
        """What turns its ids into text. Raises InputError if it is not at hand."""
        return tokenizer.tokenizer_from_dict(self.meta['tokenizer'])


def open_data(config: dict, master: bool, described: dict | None) -> Data:
    """
    The Data of a run. With prepare_data, the first process runs the folder's prepare.py if there are no token files.

    described: the tokenizer of the checkpoint that the run goes on from, or None. Raises InputError.
    """
    name = config['dataset']
    if name is None:
        name = 'openwebtext' if data_folder.token_files('data/openwebtext', 'train') else 'pystdlib'
    folder = os.path.join('data', name)
    if config['prepare_data'] and master and not glob.glob(os.path.join(glob.escape(folder), 'train*.bin')):
        _prepare(folder)
    processes.wait_for_all()
    if not os.path.isdir(folder):
        raise InputError(f'no data in {folder}: set dataset to a folder in data/, where there is {_folders_in("data")}')
    data = Data(name, folder, data_folder.read_meta(folder))
    if not tokenizer.tokenizers_agree(described, data.meta['tokenizer']):
        raise InputError(f'{config["out_dir"]}/ckpt.pt was trained with another tokenizer than that of {folder}')
    if config['document_mask'] and data.eot() is None:
        raise InputError(f'document_mask: the tokenizer of {folder} has no end of text: leave document_mask out, or '
                         f'use another dataset')
    return data


def _prepare(folder):
    script = os.path.join(folder, 'prepare.py')
    if not os.path.exists(script):
        raise InputError(f'no data in {folder}, and no {script} to prepare it: set dataset to a folder in data/, where '
                         f'there is {_folders_in("data")}')
    print(f'preparing {folder} ...', flush=True)
    if subprocess.run([sys.executable, script]).returncode:
        raise InputError(f'python {script} failed')


def _folders_in(path):
    return ', '.join(sorted(os.path.basename(os.path.dirname(f)) for f in glob.glob(f'{path}/*/'))) or 'nothing'
