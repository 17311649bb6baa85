import re
import textwrap

import pytest
import torch
from test_adapters import BESIDE, IDX, KINDS, METHODS, adapted, base, logits, randomise, trained

import sologpt.adapters.method
import sologpt.adapters.methods
from configurator import InputError
from model import GPT
from sologpt.adapters.adapter import Adapter, attach, low_rank_Bs, merge, model_class, put_adapter, tensors_of
from sologpt.adapters.arithmetic import low_rank_matrices
from sologpt.adapters.config import AdapterConfig
from sologpt.adapters.peft_files import read_adapter, write_adapter

KEYS = dict(adapter_r=None, adapter_targets=None, adapter_dropout=0.0, lora_alpha=32.0, use_rslora=False)


def test_every_module_of_the_folder_is_a_method():
    known = sologpt.adapters.methods.METHODS
    assert set(known) >= set(METHODS) and all(name == cls.name for name, cls in known.items())
    assert all(cls.__module__ == f'sologpt.adapters.methods.{name}' for name, cls in known.items())


@pytest.mark.parametrize('method', METHODS)
def test_what_a_method_says_of_itself_is_so(method):
    cls = sologpt.adapters.methods.METHODS[method]
    assert cls.adds_tokens == (method not in BESIDE) == hasattr(cls, 'new_virtual')
    m = adapted(base(method=method), method)
    assert bool(low_rank_Bs(m)) == bool(cls.lora_plus) == (method in ('lora', 'dora'))
    assert cls.needs_mask == (m.context(IDX).layer(0).append(*torch.zeros(2, 3, 2, 12, 16))[2] is not None)
    possible = {'begin_from': cls.begins_from_text, 'low_rank': cls.stackable, 'merge': cls.mergeable}
    made = Adapter(AdapterConfig(method, r=4, num_virtual_tokens=3), tensors_of(m))
    runs = {'begin_from': lambda: m.begin_from(IDX[:1, :3]), 'merge': lambda: merge(m),
            'low_rank': lambda: low_rank_matrices(m.config, made, 'it')}
    for name, run in runs.items():
        if possible[name]:
            run()
        else:
            with pytest.raises((InputError, AttributeError), match='begin_from|virtual|linear|product'):
                run()


def test_train_py_names_the_size_of_any_method_adapter_r():
    for method in METHODS:
        config = AdapterConfig.from_keys(KEYS | dict(adapter=method, adapter_r=5))
        assert (config.num_virtual_tokens if method in ('prompt', 'prefix') else config.r) == 5
        assert config.to_keys()['adapter_r'] == 5 and '5' in config.describe()
        assert AdapterConfig.from_keys(KEYS | config.to_keys()) == config
        default = {'vera': 256, 'bottleneck': 64}.get(method, 16)
        assert AdapterConfig.from_keys(KEYS | dict(adapter=method)).to_keys()['adapter_r'] == default
    assert 'adapter_targets' not in AdapterConfig('prefix').to_keys()
    one = AdapterConfig.from_keys(KEYS | dict(adapter='lora', adapter_targets='attn.c_attn,mlp.c_fc'))
    assert one.target_modules == ['attn.c_attn', 'mlp.c_fc'] and one.to_keys()['adapter_targets'] == \
        'attn.c_attn,mlp.c_fc'
    with pytest.raises(InputError, match="'lorra' is not known: use lora, or another of .*bottleneck, .*vera"):
        AdapterConfig.from_keys(KEYS | dict(adapter='lorra', adapter_r=5))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('method', ['prompt', 'prefix'])
def test_a_model_without_its_virtual_tokens_is_a_gpt(method, kind):
    plain, m = base(**kind), base(method=method, **kind)
    assert type(plain) is GPT and type(m) is model_class(AdapterConfig(method)) is not GPT
    assert m.state_dict().keys() == plain.state_dict().keys() and m.n_virtual == 0
    assert torch.equal(logits(m), logits(plain)) and m.flops_per_token() == plain.flops_per_token()
    assert torch.equal(m.generate(IDX, 8, temperature=0), plain.generate(IDX, 8, temperature=0))
    with pytest.raises(TypeError, match='build the model as'):
        attach(plain, AdapterConfig(method))


def test_the_example_of_a_method_is_one(monkeypatch, tmp_path):
    """The class in the docstring of method.py, by itself, trains, is written and read."""
    example = re.search(r'^ {4}class .*', sologpt.adapters.method.__doc__, re.S | re.M)[0]
    names = vars(sologpt.adapters.method).copy()
    exec(textwrap.dedent(example), names)
    cls = names['BitFit']
    monkeypatch.setitem(sologpt.adapters.methods.METHODS, cls.name, cls)
    config, m = AdapterConfig.from_keys(KEYS | dict(adapter=cls.name, adapter_targets='mlp.c_fc')), base()
    attach(m, config)
    assert torch.equal(logits(m), logits(base())) and len(trained(m)) == 2
    m.train().loss(IDX, IDX).backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(m).values())
    randomise(trained(m).values())
    write_adapter(str(tmp_path), Adapter(config, tensors_of(m)), m.config)
    again = base()
    put_adapter(again, read_adapter(str(tmp_path)), str(tmp_path))
    assert torch.equal(logits(again), logits(m.eval())) and not torch.equal(logits(again), logits(base()))
    with pytest.raises(InputError, match='bitfit does more than change the weights'):
        merge(again)
