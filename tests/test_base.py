import copy
import re
from dataclasses import replace

import pytest
import torch
from test_peft_files import adapter, base, logits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
from configurator import InputError
from model import GPT
from sologpt.adapters import base as base_module
from sologpt.adapters.adapter import parts, put_adapter
from sologpt.adapters.base import check_base, fingerprint, load_base
from sologpt.adapters.config import AdapterConfig
from sologpt.files.checkpoint import load_weights, save_checkpoint
from sologpt.matmuls.held import hold_base, kept_for_base
from sologpt.matmuls.nf4 import NF4Linear
from sologpt.training.liveness import Alive


def test_the_fingerprint_is_of_every_weight_and_of_nothing_else():
    model = base()
    first = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).requires_grad_(False).train()) == first == fingerprint(base())
    for p in model.parameters():
        with torch.no_grad():
            value = p.flatten()[-1].clone()
            p.view(-1)[-1] += 1e-3
            assert fingerprint(model) != first
            p.view(-1)[-1] = value
    assert fingerprint(model) == first != fingerprint(base(n_layer=1))
    for held in (model.bfloat16(), copy.deepcopy(model).float()):
        assert fingerprint(held) == fingerprint(model) != first


def test_another_base_is_refused(hf, tmp_path):
    model = base(1)
    made = replace(adapter('lora', model=copy.deepcopy(model)), base=str(tmp_path))
    state = {'model': model.state_dict(), 'model_args': model.config.to_save(), 'iter_num': 0}
    save_checkpoint(str(tmp_path), state, best=False)
    found, _ = load_base([made])
    assert torch.equal(logits(found.eval()), logits(model)) and fingerprint(found) == made.base_hash
    for source, refused in ((hf, True), (str(tmp_path), False)):
        for one in (made, replace(made, base_hash='')):
            if refused and one.base_hash:
                with pytest.raises(InputError, match=f'another base than {re.escape(hf)}.*{made.base_hash[:12]}'):
                    load_base([made], source)
            else:
                load_base([one], source)
    save_checkpoint(str(tmp_path), state | {'model': base(2).state_dict()}, best=False)
    with pytest.raises(InputError, match='another base'):
        load_base([replace(made, base_hash=''), made])
    save_checkpoint(str(tmp_path), state | {'model': base(2).state_dict(), 'merged_from': made.base_hash}, best=False)
    assert load_base([made], or_merged=True)[1]['merged_from'] == made.base_hash
    for one, either in ((made, False), (replace(made, config=AdapterConfig('dora')), True)):
        with pytest.raises(InputError, match='another base|a dora needs the rows'):
            load_base([one], or_merged=either)
    with pytest.raises(InputError, match='another base'):
        check_base(made, fingerprint(base(2)), 'it')
    with pytest.raises(InputError, match='init_from'):
        load_base([replace(made, base='')])


def test_the_base_is_held_as_it_was_in_training(hf):
    made = replace(adapter('lora', model=GPT.from_pretrained(hf)), base=hf, base_format='nf4')
    model, _ = load_base([made])
    put_adapter(model, made, 'it')
    assert parts(model) and all(isinstance(part.base, NF4Linear) for _, part in parts(model))
    with pytest.raises(InputError, match='in nf4, another for one in float32'):
        load_base([made, replace(made, base_format='float32')])


class LargestInFloat32(TorchDispatchMode):
    """The number of elements of the largest float32 tensor that an operation returns."""
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.dtype == torch.float32 and t.device.type == 'cpu':
                self.largest = max(self.largest, t.numel())
        return out


@pytest.fixture
def in_16_bits(tmp_path):
    """The folder of a Llama of transformers in bfloat16. Its matrices have 1024 and more numbers."""
    transformers = pytest.importorskip('transformers')
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True))
    model.bfloat16().save_pretrained(tmp_path / 'base')
    return str(tmp_path / 'base')


def test_no_matrix_of_a_16_bit_file_becomes_float32(in_16_bits, monkeypatch):
    monkeypatch.setattr(base_module, 'PIECE', 100)
    expected = fingerprint(GPT.from_pretrained(in_16_bits))
    with LargestInFloat32() as seen:
        model, _ = GPT.from_checkpoint(in_16_bits, kept_for_base('bfloat16'))
        assert fingerprint(model) == expected
        hold_base(model, 'bfloat16', 'bfloat16')
    assert seen.largest <= 100 and model.lm_head.weight is model.transformer.wte.weight
    assert {p.dtype for p in model.parameters() if p.dim() == 2} == {torch.bfloat16}


def test_a_16_bit_file_becomes_nf4_one_linear_at_a_time(in_16_bits):
    model, plain = GPT.from_checkpoint(in_16_bits, kept_for_base('nf4'))[0], GPT.from_pretrained(in_16_bits)
    with Alive(model.parameters()) as alive:
        hold_base(model, 'nf4', 'bfloat16')
    sizes = [p.numel() for p in plain.transformer.h.parameters() if p.dim() == 2]
    # encoding takes some copies of one Linear; copies of all in float32 would be 4 bytes for each number
    assert alive.peak - alive.now < 32 * max(sizes) < 4 * sum(sizes)
    hold_base(plain, 'nf4', 'bfloat16')
    for (name, one), (_, other) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_who_holds_a_base_in_16_bits_reads_it_so(in_16_bits, monkeypatch, project):
    asked = []

    def load(model, weights, source, kept=()):
        asked.append(kept)
        load_weights(model, weights, source, kept)
    monkeypatch.setattr(model_module, 'load_weights', load)
    both = torch.bfloat16, torch.float16
    project.train(init_from=in_16_bits, adapter='lora', adapter_r=2, base_format='nf4', max_iters=1, dtype='bfloat16',
                  n_layer=12, n_head=4, n_embd=64)
    made = replace(adapter('lora', model=GPT.from_pretrained(in_16_bits)), base_hash='')
    load_base([made], in_16_bits)
    load_base([replace(made, base_format='bfloat16')], in_16_bits)
    project.sample(out_dir=in_16_bits, dtype='bfloat16', max_new_tokens=1, dataset='tiny')
    assert asked == [both, (), (), both, (torch.bfloat16,)]
