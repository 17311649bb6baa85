import pytest
import torch

from model import GPT, GPTConfig
from sologpt.files.checkpoint import read_checkpoint, save_checkpoint
from sologpt.files.former_keys import FORMER_KEYS, translate
from sologpt.files.models import read_model
from sologpt.matmuls.spec import parse_matmul

# as a run without any of these keys saved them
DEFAULTS = {
    'dataset': 'tiny', 'optimizer': 'adamw', 'schedule': 'cosine', 'compile': False, 'adapter': '', 'adapter_r': None,
    'num_virtual_tokens': 16, 'prune': 0.0, 'prune_start': 0.2, 'prune_end': 0.7, 'muon_iterations': 5,
    'decay_part': 0.5, 'matmul': '', 'matmul_gemms': 'fwd,dgrad,wgrad', 'matmul_keep_last': None, 'matmul_until': None,
    'block_dropout': 0.1, 'block_dropout_size': 128, 'strassen_levels': 1, 'fp8_fast_accum': True,
    'reduced_precision_reduction': True, 'allow_fp16_accumulation': False, 'cuda_graphs': False}
TODAYS = {
    'dataset': 'tiny', 'optimizer': 'adamw', 'schedule': 'cosine', 'compile': False, 'adapter': '', 'adapter_r': None,
    'prune': '', 'matmul': '', 'accumulate': 'reduced'}


@pytest.mark.parametrize('former, todays', [
    ({}, {}),
    (dict(matmul='nvfp4', matmul_keep_last=2, matmul_until=0.7), dict(matmul='nvfp4:keep_last=2,until=0.7')),
    (dict(matmul='nvfp4'), dict(matmul='nvfp4')),
    (dict(matmul='mxfp4', matmul_gemms='dgrad,wgrad'), dict(matmul='mxfp4:gemms=dgrad+wgrad')),
    (dict(matmul='fp8', fp8_fast_accum=False), dict(matmul='fp8:fast_accum=False')),
    (dict(matmul='int8', fp8_fast_accum=False, strassen_levels=3), dict(matmul='int8')),
    (dict(matmul='strassen', strassen_levels=2), dict(matmul='strassen:2')),
    (dict(matmul='block_dropout', block_dropout=0.2, block_dropout_size=64), dict(matmul='block_dropout:0.2,size=64')),
    (dict(matmul='block_dropout', block_dropout_size=64), dict(matmul='block_dropout:size=64')),
    (dict(prune=0.5), dict(prune='0.5:0.2-0.7')),
    (dict(prune=0.9, prune_start=0.00001, prune_end=1.0), dict(prune='0.9:0.00001-1.0')),
    (dict(allow_fp16_accumulation=True), dict(accumulate='float16')),
    (dict(reduced_precision_reduction=False), dict(accumulate='float32')),
    (dict(cuda_graphs=True, compile=True), dict(compile='cuda_graphs')),
    (dict(schedule='wsd'), dict(schedule='wsd')),
    (dict(schedule='wsd', decay_part=0.7), dict(schedule='wsd:0.7')),
    (dict(decay_part=0.7), {}),
    (dict(optimizer='muon'), dict(optimizer='muon')),
    (dict(optimizer='muon', muon_iterations=4), dict(optimizer='muon:4')),
    (dict(muon_iterations=4), {}),
    (dict(adapter='prompt', num_virtual_tokens=3), dict(adapter='prompt', adapter_r=3)),
    (dict(adapter='prefix'), dict(adapter='prefix', adapter_r=16)),
    (dict(adapter='lora', adapter_r=4, num_virtual_tokens=3), dict(adapter='lora', adapter_r=4)),
])
def test_todays_keys_stand_for_former_ones(former, todays):
    config = DEFAULTS | former
    before = dict(config)
    assert translate(config) == TODAYS | todays
    assert config == before
    assert translate(TODAYS | todays) == TODAYS | todays


def test_a_config_from_before_these_keys():
    """The first versions had fewer keys, and nanoGPT's configs have none of them."""
    early = {'dataset': 'tiny', 'optimizer': 'muon', 'learning_rate': 0.02, 'matmul': 'int8', 'prune': 0.25}
    assert translate(early) == early | {'prune': '0.25:0.2-0.7'}
    nanogpts = {'dataset': 'shakespeare_char', 'learning_rate': 1e-3, 'compile': True, 'dtype': 'float16'}
    assert translate(nanogpts) == nanogpts
    assert translate({}) == {}


def test_every_former_key_has_advice_and_none_is_left():
    assert not translate(DEFAULTS).keys() & FORMER_KEYS.keys()
    assert DEFAULTS.keys() - TODAYS.keys() == FORMER_KEYS.keys()
    for key, advice in FORMER_KEYS.items():
        assert 'write --' in advice, key


@pytest.mark.parametrize('now, keep_last, text', [
    ('sparse24', 1, 'sparse24:keep_last=1'), ('', 1, ''), ('sparse24', None, 'sparse24')])
def test_a_checkpoint_is_read_with_todays_keys(tmp_path, now, keep_last, text):
    """'matmul' beside the config says what the weights follow: nothing once the run is past `until`."""
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)
    save_checkpoint(tmp_path, {
        'model': GPT(config).state_dict(), 'model_args': config.to_save(), 'iter_num': 5, 'matmul': now,
        'config': DEFAULTS | {'matmul': 'sparse24', 'matmul_keep_last': keep_last}}, best=False)
    for saved in (read_checkpoint(tmp_path / 'ckpt.pt'), read_model(str(tmp_path))[2]):
        assert saved['matmul'] == text
        assert saved['config'] == TODAYS | {'matmul': 'sparse24' if keep_last is None else 'sparse24:keep_last=1'}
    if text:
        assert parse_matmul(saved['matmul']).resolved(2).keep_last == (keep_last or 0)


def test_nanogpts_checkpoint_stays_as_it_is(tmp_path):
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8)
    content = {'model': GPT(config).state_dict(), 'model_args': config.to_save(), 'iter_num': 5,
               'best_val_loss': torch.tensor(1.5), 'config': {'dataset': 'x', 'compile': True}}
    save_checkpoint(tmp_path, content, best=False)
    saved = read_checkpoint(tmp_path / 'ckpt.pt')
    assert saved['config'] == content['config'] and saved.keys() == content.keys()
