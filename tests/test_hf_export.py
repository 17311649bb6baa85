"""What export.py writes for other software, run by that software."""

import json
import math
import os
import pathlib
import pickle
import re

import numpy as np
import peft
import pytest
import tiktoken
import tokenizers
import torch
import torch.nn as nn
import transformers
from conftest import options, write_tokens

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.adapters.adapter import Adapter, attach, model_class, put_adapter, tensors_of
from sologpt.adapters.base import fingerprint, load_base
from sologpt.adapters.config import AdapterConfig
from sologpt.adapters.peft_files import read_adapter, write_adapter
from sologpt.files.checkpoint import read_checkpoint, save_checkpoint
from sologpt.tokens import tokenizer, tokenizer_files
from sologpt.tokens.tokenizer_json import CHAR_BYTES

CODE = pathlib.Path(os.__file__).with_name('textwrap.py').read_text(encoding='utf-8')
SCRIPTS = ('Ελλάδα Москва 日本語 한국어 עברית हिन्दी naïve \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \r\n\t '
           '\u2028\u3000 ==== --- 1234567 \0Ā')


@pytest.fixture(scope='session')
def bpe():
    """A byte-level BPE of 400 ids, trained here: a tokenizers.Tokenizer."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator([CODE + SCRIPTS], tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=['<|endoftext|>'], initial_alphabet=alphabet, show_progress=False))
    return trained


@pytest.fixture
def tokenizer_of(bpe, monkeypatch):
    """Kind of a tokenizer -> the tokenizer."""
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(CHAR_BYTES[c] for c in token) for token, _ in vocab if token != '<|endoftext|>']

    def encoding(name):  # the same as tiktoken has it, with the expression of its cl100k_base
        return tiktoken.Encoding(name, mergeable_ranks={token: i for i, token in enumerate(tokens)},
                                 special_tokens={'<|endoftext|>': len(tokens)}, pat_str=(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
            r"\s+(?!\S)|\s"))
    monkeypatch.setattr(tiktoken, 'get_encoding', encoding)
    return {'bytes': tokenizer.Bytes, 'chars': lambda: tokenizer.Chars(sorted(set(CODE + SCRIPTS))),
            'tiktoken': lambda: tokenizer.Tiktoken('gpt2'),
            'json': lambda: tokenizer.HuggingFace(bpe.to_str(), bpe.token_to_id('<|endoftext|>'))}


def save_model(folder, text, padding=0, **changes):
    """A checkpoint whose weights are far from zero, and random."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(block_size=32, vocab_size=text.vocab_size + padding, n_ids=text.vocab_size, n_layer=2,
                                 n_head=2, n_embd=16) | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    os.makedirs(folder)
    save_checkpoint(folder, {
        'model': model.state_dict(), 'model_args': model.config.to_save(), 'iter_num': 7, 'tokens': 7000,
        'best_iter': 6, 'best_val_loss': 1.5, 'tokenizer': text.to_dict(), 'data': {'name': 'mine', 'source': 'a book'},
        'config': {'dataset': 'mine', 'learning_rate': 0.001}}, best=False)
    return model.eval()


def exporter(project):
    return lambda **keys: project._in_process('export.py', options(keys))[1]


def logits(model, ids):
    with torch.no_grad():
        found = model(ids, ids)[0] if isinstance(model, GPT) else model(ids).logits
    return found[..., :model.config.n_ids] if isinstance(model, GPT) else found


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


CASES = [  # to, kind of tokenizer, padding of the table, GPTConfig
    ('hf', 'bytes', 0, {}),
    ('hf', 'chars', 9, dict(bias=False, activation='gelu_new')),
    ('hf', 'tiktoken', 48, dict(tied=False, activation='relu2')),
    ('hf', 'json', 0, dict(bias=False)),
    ('hf', 'bytes', 64, dict(arch='modern')),
    ('hf', 'chars', 0, dict(arch='modern', tied=True)),
    ('hf', 'tiktoken', 0, dict(arch='modern', embd_norm=False, tied=True)),
    ('hf', 'json', 5, dict(arch='modern', activation='gelu')),
    ('opt', 'bytes', 0, dict(bias=False)),
    ('opt', 'json', 7, dict(activation='gelu_new', tied=False)),
]


@pytest.mark.parametrize('to, kind, padding, changes', CASES)
def test_in_transformers(project, tokenizer_of, to, kind, padding, changes):
    text = tokenizer_of[kind]()
    ours = save_model('run', text, padding, **changes)
    out = exporter(project)(to=to, out_dir='run', dest='out')
    theirs = transformers.AutoModelForCausalLM.from_pretrained('out').eval()
    assert type(theirs).__name__ in out
    ids = torch.randint(text.vocab_size, (3, 32))
    close(logits(theirs, ids), logits(ours, ids))
    # the same text as sample.py's, through their tokenizer
    their_text = transformers.AutoTokenizer.from_pretrained('out')
    start = 'def x'
    asked = their_text(start, return_tensors='pt')
    drawn = theirs.generate(**asked, do_sample=False, max_new_tokens=20, eos_token_id=-1)[0]
    greedy = dict(start=start, temperature=0, num_samples=1, max_new_tokens=20, device='cpu', dtype='float32')
    said = project.sample(**greedy | dict(out_dir='run'))
    decoded = their_text.decode(drawn)
    ended = text.eot is not None and text.eot in drawn.tolist()
    assert not ended and said == f'{decoded}\n---------------\n'
    # read here it is the same model, with the same tokenizer, and writing it again gives the same bytes
    assert project._in_process('sample.py', options(greedy | dict(init_from='out')))[1] == said
    exporter(project)(to=to, out_dir='out', dest='again')
    for name in ('model.safetensors', 'config.json', 'generation_config.json', 'tokenizer.json',
                 'tokenizer_config.json'):
        assert pathlib.Path('out', name).read_bytes() == pathlib.Path('again', name).read_bytes(), name


@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_in_half_the_bytes(project, tokenizer_of, arch):
    ours = save_model('run', tokenizer.Bytes(), arch=arch)
    export = exporter(project)
    export(to='hf', out_dir='run', dest='out', dtype='bfloat16')
    theirs = transformers.AutoModelForCausalLM.from_pretrained('out', dtype='auto')
    assert theirs.dtype == torch.bfloat16
    ids = torch.randint(256, (3, 32))
    rounded = GPT.from_pretrained('out').eval()
    close(logits(theirs.float().eval(), ids), logits(rounded, ids))
    assert 0 < (logits(rounded, ids) - logits(ours, ids)).abs().max() < 0.5
    export(to='hf', out_dir='out', dest='again', dtype='bfloat16')
    assert pathlib.Path('out/model.safetensors').read_bytes() == pathlib.Path('again/model.safetensors').read_bytes()


def mixed_text():
    """1 MB: code, several scripts, emoji, characters of all of Unicode, long runs of one."""
    rng = np.random.default_rng(0)
    ranges = [(32, 127), (0xa0, 0x3000), (0x3000, 0xd800), (0x1f300, 0x1fa00), (0xe000, 0x20000)]
    drawn = ''.join(chr(rng.integers(*ranges[i])) for i in rng.integers(len(ranges), size=60_000))
    runs = ''.join('a =-\n\t\r\u00a0\u2028\x85\x0b0\'s'[i] * n for i, n in zip(
        rng.integers(14, size=20_000), rng.integers(1, 12, size=20_000), strict=True))
    text = drawn + runs + SCRIPTS
    return text + CODE * math.ceil((1_000_000 - len(text.encode())) / len(CODE))


@pytest.mark.parametrize('kind', ['bytes', 'chars', 'tiktoken', 'json'])
def test_tokenizers(tmp_path, tokenizer_of, kind):
    text = mixed_text()
    assert len(text.encode()) >= 1_000_000
    ours = tokenizer.Chars(sorted(set(text))) if kind == 'chars' else tokenizer_of[kind]()
    tokenizer_files.write_tokenizer(tmp_path, ours, 32)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode(text)
    assert theirs(text)['input_ids'] == ids
    assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs.eos_token_id == ours.eot
    if ours.eot is not None:  # in a text, and left out of one
        end = ours.decode([ours.eot])
        assert theirs(f'a{end}b')['input_ids'] == ours.encode(f'a{end}b') == [*ours.encode('a'), ours.eot,
                                                                             *ours.encode('b')]
        assert theirs.decode([*ours.encode('a'), ours.eot], skip_special_tokens=True) == 'a'
    described = tokenizer_files.read_tokenizer(tmp_path)
    assert described == ours.to_dict() or kind == 'tiktoken' and tokenizer.tokenizers_agree(described, ours.to_dict())
    again = tokenizer.tokenizer_from_dict(json.loads(json.dumps(described)))
    assert again.encode(SCRIPTS) == ours.encode(SCRIPTS) and again.eot == ours.eot
    pieces = (again.to_bytes([i]) for i in again.encode(SCRIPTS))  # as sample.py streams them
    assert b''.join(pieces).decode() == SCRIPTS


def tune(name, base, method, seed, **options):
    """An adapter of random tensors in a folder, for the model in the folder `base`. Returns what its model computes."""
    model = model_class(AdapterConfig(method)).from_checkpoint(base)[0]
    found = fingerprint(model)
    attach(model, AdapterConfig(method, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    tensors = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    adapter = Adapter(AdapterConfig(method, **options), tensors, base, found)
    write_adapter(name, adapter, model.config)
    return model.eval()


METHODS = {
    'a': ('lora', dict(r=4)), 'b': ('lora', dict(r=2, use_rslora=True, target_modules=['c_attn', 'mlp.c_proj'])),
    'c': ('lora', dict(r=3, rank_pattern={'c_fc': 5}, alpha_pattern={'c_attn': 7.0}, layers_to_transform=[1])),
    'd': ('dora', dict(r=2)), 'v': ('vera', dict(r=6)), 'p': ('prompt', dict(num_virtual_tokens=3)),
    'k': ('prefix', dict(num_virtual_tokens=3))}


@pytest.mark.parametrize('to, changes', [('opt', {}), ('opt', dict(bias=False)), ('hf', dict(bias=False)),
                                         ('hf', dict(arch='modern'))])
def test_adapters_beside(project, tokenizer_of, to, changes):
    save_model('run', tokenizer.Bytes(), padding=8, **changes)
    models = {name: tune(name, 'run', method, i, **options) for i, (name, (method, options)) in
              enumerate(METHODS.items())}
    exporter(project)(to=to, adapters=','.join(models), dest='out')
    ids = torch.randint(256, (2, 20))
    for name, ours in models.items():
        method, _ = METHODS[name]
        theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained('out'), f'out/{name}')
        found = logits(theirs.eval(), ids)[:, 3 if method == 'prompt' else 0:]
        with torch.no_grad():
            expected = ours.lm_head(ours.hidden(ids))[..., :256]
        close(found, expected)
        if method in ('lora', 'dora', 'vera'):  # and as the weights themselves
            exporter(project)(to='merged', adapters=name, out_dir='run', dest=f'merged-{name}')
            close(found, logits(GPT.from_checkpoint(f'merged-{name}')[0].eval(), ids)[..., :256])
        if to == 'hf' and 'arch' not in changes:  # GPT-2's own are read here as well
            read = read_adapter(f'out/{name}')
            model, _ = load_base([read])
            put_adapter(model, read, name)
            with torch.no_grad():
                close(model.eval().lm_head(model.hidden(ids)), expected)


def test_several_adapters_of_one_model(project, tokenizer_of):
    """As inference servers have them: one OPT, three LoRA adapters, chosen by name."""
    save_model('run', tokenizer.Bytes(), bias=False)
    models = {name: tune(name, 'run', *METHODS[name][:1], seed=i, **METHODS[name][1]) for i, name in enumerate('abc')}
    exporter(project)(to='opt', adapters='a,b,c', dest='out')
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained('out'), 'out/a', 'a')
    for name in 'bc':
        theirs.load_adapter(f'out/{name}', name)
    ids = torch.randint(256, (2, 32))
    for name in 'abcab':
        theirs.set_adapter(name)
        adapters_own = models[name]
        close(logits(theirs.eval(), ids), logits(adapters_own, ids))
    for name in 'abc':  # what servers ask of a file: one rank, no patterns, names of modules
        config = json.loads(pathlib.Path(f'out/{name}/adapter_config.json').read_text())
        assert not config['rank_pattern'] and not config['alpha_pattern'] and not config['use_rslora']


def nanogpts_optimizer(model_args, named):
    """AdamW as nanoGPT's configure_optimizers() groups parameters."""
    decay = [p for p in named.values() if p.dim() >= 2]
    return torch.optim.AdamW([{'params': decay, 'weight_decay': 0.1},
                              {'params': [p for p in named.values() if p.dim() < 2], 'weight_decay': 0.0}], lr=1e-3)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_nanogpt(project, optimizer):
    trained, _ = project.train(optimizer=optimizer, max_iters=6)
    out = exporter(project)(to='nanogpt', dest='nano')
    assert ('with the moments' if optimizer == 'adamw' else 'without the moments') in out
    theirs = torch.load('nano/ckpt.pt', weights_only=True)
    assert theirs['model_args'].keys() == {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}
    assert theirs['iter_num'] == 6 and theirs['best_val_loss'] == trained['progress'].best_val_loss
    own = dict(trained['model'].named_parameters())
    assert theirs['model'].keys() == {*own, 'lm_head.weight', 'transformer.wte.weight'}
    assert all(torch.equal(theirs['model'][name], p) for name, p in own.items())
    theirs_optimizer = nanogpts_optimizer(theirs['model_args'], {name: nn.Parameter(p.detach().clone())
                                                                 for name, p in own.items()})
    theirs_optimizer.load_state_dict(theirs['optimizer'])
    if optimizer == 'adamw':
        for p, q in zip((p for group in theirs_optimizer.param_groups for p in group['params']),
                        (p for group in trained['opt'].param_groups for p in group['params']), strict=True):
            assert torch.equal(theirs_optimizer.state[p]['exp_avg'], trained['opt'].state[q]['exp_avg'])
        # it goes on as the run itself would
        before = project.resume(max_iters=8)[0]
        after = project.train(init_from='resume', out_dir='nano', max_iters=8)[0]
        for name, p in before['model'].state_dict().items():
            assert torch.equal(p, after['model'].state_dict()[name]), name
    meta = pickle.loads(pathlib.Path('nano/meta.pkl').read_bytes())
    assert meta['vocab_size'] == 256 and meta['stoi']['a'] == 97 and meta['itos'][97] == 'a' and 200 in meta['itos']


@pytest.mark.parametrize('to', ['onnx', 'torch'])
@pytest.mark.parametrize('changes', [dict(bias=True), dict(arch='modern', smear=True), dict(positions='rotary')])
def test_as_a_program(project, tokenizer_of, to, changes):
    """Also what no architecture of transformers has: smear, or GPT-2's parts with rotary positions."""
    ours = save_model('run', tokenizer.Bytes(), padding=8, **changes)
    out = exporter(project)(to=to, out_dir='run', dest='out')
    if to == 'onnx':
        import onnxruntime
        session = onnxruntime.InferenceSession('out/model.onnx', providers=['CPUExecutionProvider'])
        assert float(re.search(r'differ by at most (\S+)', out)[1]) < 1e-4

        def run(ids):
            return torch.from_numpy(session.run(['logits'], {'input_ids': ids.numpy()})[0])
    else:
        run = torch.export.load('out/model.pt2').module()
    for shape in ((1, 1), (1, 2), (3, 7), (5, 1), (2, 32)):
        ids = torch.randint(256, shape)
        close(run(ids), logits(ours, ids)[..., :256])
    assert transformers.AutoTokenizer.from_pretrained('out')('ab')['input_ids'] == [97, 98]


def test_masked_weights_go_out_masked(project):
    project.train(matmul='sparse24:until=1.0', max_iters=2)
    greedy = dict(start='FMT', temperature=0)
    said = project.sample(**greedy)
    exporter(project)(to='hf', dest='hf')
    theirs = transformers.AutoModelForCausalLM.from_pretrained('hf')
    weight = theirs.transformer.h[0].mlp.c_fc.weight.T
    assert (weight.reshape(-1, 4) == 0).sum(1).eq(2).float().mean() > 0.99
    ids = torch.tensor([list(b'FMT')])
    drawn = theirs.generate(ids, do_sample=False, max_new_tokens=13, attention_mask=torch.ones_like(ids))
    assert said.encode().startswith(bytes(drawn[0].tolist()))


def test_the_last_blocks_may_be_unmasked(project, tokenizer_of):
    """The spec beside the weights says how many blocks are dense; once it is empty, all of them are."""
    ours = save_model('run', tokenizer.Bytes())
    saved = read_checkpoint('run/ckpt.pt')
    for matmul, masked in (('sparse24:keep_last=1', [True, False]), ('sparse24', [True, True]), ('', [False, False])):
        name = f'out-{matmul}'
        save_checkpoint('run', saved | {'matmul': matmul}, best=False)
        exporter(project)(to='hf', out_dir='run', dest=name)
        read = GPT.from_pretrained(name)
        for i in range(2):
            weight, dense = (model.transformer.h[i].mlp.c_fc.weight for model in (read, ours))
            assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all() == masked[i]
            assert torch.equal(weight, dense) != masked[i]
        greedy = dict(start='def x', temperature=0, num_samples=1, max_new_tokens=20, device='cpu', dtype='float32')
        said = project.sample(out_dir='run', **greedy)
        assert project._in_process('sample.py', options(greedy | dict(init_from=name)))[1] == said


def test_trains_on_from_a_folder(project, tokenizer_of):
    """As from the checkpoint: also what goes over the weights in memory, which lie transposed in GPT-2's files."""
    project.train(out_dir='run', bias=True)
    exporter(project)(to='hf', out_dir='run', dest='hf')
    assert all(p.is_contiguous() for p in GPT.from_pretrained('hf').parameters())
    for out_dir, source in (('a', 'run'), ('b', 'hf')):
        project.train(out_dir=out_dir, init_from=source, prune=0.5, max_iters=6)
    one, other = (read_checkpoint(f'{out_dir}/ckpt.pt')['model'] for out_dir in 'ab')
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(InputError, match='out_dir=hf is the folder of the model'):
        project.train(out_dir='hf', init_from='hf')
    assert project.sample(out_dir='hf', start='a') == project.sample(out_dir='run', start='a')


def test_a_tokenizer_that_was_changed_afterwards(project, tokenizer_of):
    save_model('run', tokenizer.Bytes())
    exporter(project)(to='hf', out_dir='run', dest='out')
    theirs = transformers.AutoTokenizer.from_pretrained('out')
    theirs.add_tokens(['<user>'])
    theirs.save_pretrained('out')
    found = tokenizer.tokenizer_from_dict(tokenizer_files.read_tokenizer('out'))
    assert found.vocab_size == 257 and found.encode('a<user>') == theirs('a<user>')['input_ids'] == [97, 256]


def test_onnx_in_bfloat16_is_written(project, tokenizer_of):
    save_model('run', tokenizer.Bytes())
    out = exporter(project)(to='onnx', out_dir='run', dest='out', dtype='bfloat16')
    assert 'model.onnx in bfloat16; not checked, because onnxruntime cannot run it here' in out
    assert os.listdir('out').count('model.onnx') == 1


def test_model_card(project, tokenizer_of):
    save_model('run', tokenizer_of['tiktoken']())
    tune('a', 'run', 'lora', 0)
    exporter(project)(to='hf', adapters='a', dest='out')
    card = pathlib.Path('out/README.md').read_text()
    for said in ('mine: a book', '7,000 tokens in 7 iterations', '1.5000 nats per token, at iteration 6',
                 'GPT2LMHeadModel: 2 layers', 'tiktoken, 400 ids', '"learning_rate": 0.001',
                 '| adapters beside it | a |'):
        assert said in card, said


def test_model_card_of_a_run_and_of_its_adapter(project):
    project.train(max_iters=6)
    project.train(init_from='out', out_dir='a', adapter='lora', adapter_r=2, max_iters=2)
    exporter(project)(to='merged', adapters='a', weights='0.5', dest='merged')
    for source, said in (('out', ['tiny: a test', '384 tokens in 6 iterations', 'nats per token, at iteration 6',
                                  '"learning_rate": 0.01']), ('merged', ['tiny: a test', 'a (lora, times 0.5)'])):
        exporter(project)(to='hf', out_dir=source, dest=f'hf-{source}')
        card = pathlib.Path(f'hf-{source}/README.md').read_text()
        assert f'# hf-{source}\n' in card and all(words in card for words in said), card
    save_model('modern', tokenizer.Bytes(), arch='modern')
    exporter(project)(to='hf', out_dir='modern', dest='hf-modern')
    assert 'package `xielu` ignores' in pathlib.Path('hf-modern/README.md').read_text()


def test_what_cannot_be_written(project, tokenizer_of):
    save_model('run', tokenizer.Bytes())
    save_model('modern', tokenizer.Bytes(), arch='modern')
    save_model('smear', tokenizer.Bytes(), arch='modern', smear=True)
    save_model('other', tokenizer.Bytes(), qk_norm=True)
    tune('w', 'run', 'bottleneck', 0)
    tune('a', 'run', 'lora', 0)
    write_tokens(project.folder / 'data' / 'chars', [0], [0], tokenizer={'kind': 'chars', 'chars': ['a']})
    short = read_checkpoint('run/ckpt.pt')
    short['model']['transformer.wpe.weight'] = short['model']['transformer.wpe.weight'][:9]
    os.makedirs('short')
    save_checkpoint('short', short, best=False)
    large = read_checkpoint('run/ckpt.pt')
    large['model']['transformer.ln_f.weight'][3] = 1e5
    os.makedirs('large')
    save_checkpoint('large', large, best=False)
    os.makedirs('deep')
    tune('deep/a', 'run', 'lora', 1)
    project.train(matmul='ternary', max_iters=1, out_dir='ternary')
    for keys, message in (
            (dict(out_dir='smear'), 'smear=True.*ApertusForCausalLM.*--smear=False'),
            (dict(out_dir='other'), 'qk_norm=True.*GPT2LMHeadModel'),
            (dict(out_dir='modern', to='opt'), "norm='rmsnorm'.*OPTForCausalLM"),
            (dict(out_dir='modern', to='nanogpt'), "norm='rmsnorm', nanoGPT only 'layernorm'"),
            (dict(out_dir='ternary'), 'matmul=ternary'), (dict(out_dir='a'), 'a holds an adapter|no model|a is not a'),
            (dict(adapters='w'), 'bottleneck, which peft does not have'),
            (dict(adapters='a,deep/a'), 'two have one name'),
            (dict(adapters='a', weights='0.5'), 'use --to=merged first'),
            (dict(dest='run', out_dir='run'), 'dest=run is there already'),
            (dict(out_dir='nothere'), "no folder or checkpoint 'nothere'"), (dict(), "no folder or checkpoint 'out'"),
            (dict(dataset='none', out_dir='run'), 'no folder data/none'),
            (dict(dataset='chars', out_dir='run'), 'another tokenizer than data/chars has'),
            (dict(out_dir='short'), 'short: transformer.wpe.weight has the shape'),
            (dict(out_dir='run', dest='run/ckpt.pt/x'), "dest='run/ckpt.pt/x' cannot be written")):
        with pytest.raises(InputError, match=message):
            exporter(project)(**dict(to='hf', dest='out') | keys)
        assert not os.path.exists('out'), keys
    with pytest.raises(InputError, match='transformer.ln_f.weight has numbers beyond 65504'):
        exporter(project)(to='hf', out_dir='large', dest='out', dtype='float16')
    for keys in (dict(to='nanogpt', out_dir='large'), dict(to='torch', out_dir='large'),
                 dict(to='merged', adapters='a', weights='1e9')):
        with pytest.raises(InputError, match='weight has numbers beyond 65504'):
            exporter(project)(dest='out', dtype='float16', **keys)
    assert not os.path.exists('out') and not os.path.exists('out.partial')
