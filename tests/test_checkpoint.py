import os
import pickle

import pytest
import torch

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.files.checkpoint import load_weights, read_checkpoint, save_checkpoint

CONFIG = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8)


def content(**more):
    model = GPT(CONFIG)
    return {'model': model.state_dict(), 'model_args': CONFIG.to_save(), 'iter_num': 5} | more


def test_newest_and_best(tmp_path):
    save_checkpoint(tmp_path, content(), best=True)
    save_checkpoint(tmp_path, content(iter_num=9), best=False)
    assert read_checkpoint(tmp_path / 'ckpt.pt')['iter_num'] == 9
    assert read_checkpoint(tmp_path / 'best.pt')['iter_num'] == 5
    assert sorted(os.listdir(tmp_path)) == ['best.pt', 'ckpt.pt']


def test_a_failed_save_leaves_the_old_one_whole(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, content(), best=True)

    def half(obj, f):
        f.write(b'half')
        raise OSError('disk full')
    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(InputError, match='disk full'):
        save_checkpoint(tmp_path, content(iter_num=9), best=True)
    assert read_checkpoint(tmp_path / 'ckpt.pt')['iter_num'] == 5
    assert sorted(os.listdir(tmp_path)) == ['best.pt', 'ckpt.pt']


def test_a_save_that_was_killed_between_its_renames(tmp_path, monkeypatch):
    replace = os.replace

    def killed(source, target):
        if str(target).endswith('ckpt.pt'):
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, content(), best=True)
    monkeypatch.setattr(os, 'replace', replace)
    save_checkpoint(tmp_path, content(iter_num=9), best=False)
    assert read_checkpoint(tmp_path / 'best.pt')['iter_num'] == 5  # and not overwritten through its other name


def test_nanogpts_compiled_names_and_masks(tmp_path):
    saved = content()
    theirs = {f'_orig_mod.{k}': v for k, v in saved['model'].items()}
    theirs['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 8, 8).tril()
    torch.save(saved | {'model': theirs}, tmp_path / 'ckpt.pt')
    assert read_checkpoint(tmp_path / 'ckpt.pt')['model'].keys() == saved['model'].keys()


class Evil:
    def __reduce__(self):
        return os.mkdir, ('ran',)


def truncated(path):
    torch.save(content(), path)
    with open(path, 'r+b') as f:
        f.truncate(os.path.getsize(path) * 2 // 3)


def write(path, data):
    with open(path, 'wb') as f:
        f.write(data)


@pytest.mark.parametrize('make, message', [
    (lambda p: None, 'no checkpoint'),
    (truncated, 'damaged'),
    (lambda p: write(p, b''), 'damaged'),
    (lambda p: write(p, b'not a checkpoint at all'), 'damaged or no checkpoint'),
    (lambda p: torch.save({'weights': 1}, p), "it has no 'model'"),
    (lambda p: torch.save([1, 2], p), 'not a soloGPT or nanoGPT checkpoint'),
    (lambda p: torch.save(content(extra=Evil()), p), 'could run code'),
    (lambda p: write(p, pickle.dumps(Evil())), 'could run code|damaged'),
])
def test_refused(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    make('ckpt.pt')
    with pytest.raises(InputError, match=message):
        read_checkpoint('ckpt.pt')
    assert not os.path.exists('ran')


def test_weights_of_another_shape_are_named():
    with pytest.raises(InputError, match=r'wpe.weight has the shape \(8, 8\), this model needs \(16, 8\)'):
        load_weights(GPT(GPTConfig(**CONFIG.to_save() | {'block_size': 16})), content()['model'], 'ckpt.pt')
    with pytest.raises(InputError, match='missing from the file'):
        load_weights(GPT(GPTConfig(**CONFIG.to_save() | {'n_layer': 2})), content()['model'], 'ckpt.pt')
