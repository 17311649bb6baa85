import json
import re
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.adapters.adapter import Adapter, attach, model_class, put_adapter, tensors_of
from sologpt.adapters.base import fingerprint, load_base
from sologpt.adapters.config import AdapterConfig
from sologpt.adapters.peft_files import CONFIG, WEIGHTS, read_adapter, write_adapter
from sologpt.files.family import LINEARS

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning')  # of transformers about itself
P = 3
IDX = torch.randint(33, (2, 11), generator=torch.Generator().manual_seed(7))


def randomise(tensors, std=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in tensors:
            t.copy_(torch.randn(t.shape, generator=generator) * std)


def base(seed=0, method='lora', **changes):
    cls = model_class(AdapterConfig(method))
    m = cls(GPTConfig(**dict(block_size=16, vocab_size=33, n_layer=2, n_head=4, n_embd=32, bias=True) | changes)).eval()
    randomise(m.parameters(), seed=seed)
    return m


def adapter(method, seed=1, model=None, **options):
    """An adapter with random tensors."""
    model = base(method=method) if model is None else model
    found = fingerprint(model)
    size = {'num_virtual_tokens': P} if method in ('prompt', 'prefix') else {'r': 4}
    config = AdapterConfig(method, **size | options)
    attach(model, config)
    randomise([p for p in model.parameters() if p.requires_grad], seed=seed)
    return Adapter(config, {name: t.clone() for name, t in tensors_of(model).items()}, 'somewhere', found)


@torch.no_grad()
def logits(m):
    return m.lm_head(m.eval().hidden(IDX))


def logits_with(adapter, model=None):
    model = base(method=adapter.config.method) if model is None else model
    put_adapter(model, adapter, 'a test')
    return logits(model)


def write(folder, adapter, config=None):
    write_adapter(str(folder), adapter, config or base().config)
    return folder


def close(found, expected):
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# peft's files.

ALL = list(LINEARS)
CASES = {
    'lora': ('lora', dict(target_modules=ALL)),
    'patterns': ('lora', dict(target_modules=ALL, rank_pattern={'c_fc': 2, r'h\.1\.attn\.c_proj': 6},
                              alpha_pattern={'mlp.c_proj': 3.0, 'c_fc': 5.0})),
    'rslora': ('lora', dict(target_modules=ALL, use_rslora=True)),
    'rslora_patterns': ('lora', dict(target_modules=ALL, use_rslora=True, rank_pattern={'attn.c_attn': 2})),
    'regex': ('lora', dict(target_modules=r'transformer\.h\.\d\.(attn\.c_attn|mlp\.c_.*)')),
    'bare': ('lora', dict(target_modules=['c_proj'])),
    'all-linear': ('lora', dict(target_modules='all-linear')),
    'layers': ('lora', dict(target_modules=ALL, layers_to_transform=[1])),
    'exclude': ('lora', dict(target_modules=['c_attn', 'c_proj'], exclude_modules=['mlp.c_proj'])),
    'exclude_regex': ('lora', dict(target_modules=ALL, exclude_modules=r'.*\.0\.mlp\..*')),
    'dora': ('dora', dict(target_modules=ALL)),
    'dora_rslora': ('dora', dict(target_modules=['c_attn', 'mlp.c_fc'], use_rslora=True, rank_pattern={'c_fc': 2})),
    'vera': ('vera', dict(target_modules=ALL, projection_prng_key=5)),
    'vera_narrow': ('vera', dict(target_modules=['c_attn'], layers_to_transform=[0])),
    'vera_regex': ('vera', dict(target_modules='.*c_attn', layers_to_transform=[1])),  # blocks of lists alone
    'prompt': ('prompt', {}),
    'prefix': ('prefix', {}),
}


def peft_config(peft, method, options):
    if method == 'prompt':
        return peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=P)
    if method == 'prefix':
        return peft.PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=P)
    if method == 'vera':
        return peft.VeraConfig(task_type='CAUSAL_LM', r=4, fan_in_fan_out=True, **options)
    return peft.LoraConfig(task_type='CAUSAL_LM', r=4, lora_alpha=8.0, fan_in_fan_out=True, use_dora=method == 'dora',
                           **options)


@torch.no_grad()
def peft_logits(model, method):
    return model.eval()(input_ids=IDX).logits[:, P if method == 'prompt' else 0:]


def saved_by_peft(peft, hf, folder, method, options):
    """The logits of an adapter that peft has made and saved."""
    model = transformers.GPT2LMHeadModel.from_pretrained(hf)
    model = peft.get_peft_model(model, peft_config(peft, method, options))
    randomise([p for p in model.parameters() if p.requires_grad], seed=1)
    model.save_pretrained(folder)
    return peft_logits(model, method)


def loaded_by(peft, model, folder):
    """A model of transformers with the adapter in `folder`, whose tensors have to be just those that peft wants."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model = peft.PeftModel.from_pretrained(model, folder)
    assert not [w for w in caught if re.search('missing|unexpected|fan_in_fan_out', str(w.message), re.I)]
    assert peft.get_peft_model_state_dict(model).keys() == load_file(folder / WEIGHTS).keys()
    return model


def loaded_by_peft(peft, hf, folder, method):
    """The logits of GPT-2 with the adapter in `folder` in peft."""
    return peft_logits(loaded_by(peft, transformers.GPT2LMHeadModel.from_pretrained(hf), folder), method)


@pytest.mark.parametrize('case', CASES)
def test_what_peft_writes_is_read(case, hf, tmp_path):
    method, options = CASES[case]
    expected = saved_by_peft(pytest.importorskip('peft'), hf, tmp_path, method, options)
    found = read_adapter(tmp_path)
    assert (found.base, found.base_hash, found.config.method) == (hf, '', method)
    model, _ = load_base([found])
    assert (expected - logits(model)).abs().max() > 0.1
    close(logits_with(found, model.eval()), expected)


@pytest.mark.parametrize('case', CASES)
def test_what_is_written_is_read_by_peft(case, hf, tmp_path):
    peft, (method, options) = pytest.importorskip('peft'), CASES[case]
    alpha = {'lora_alpha': 8.0} if method in ('lora', 'dora') else {}
    cls = model_class(AdapterConfig(method))
    model = cls.from_pretrained(hf).eval()
    made = replace(adapter(method, model=model, **options, **alpha), base=hf)
    write(tmp_path, made, model.config)
    close(loaded_by_peft(peft, hf, tmp_path, method), logits(model))
    close(logits_with(read_adapter(tmp_path), cls.from_pretrained(hf).eval()), logits(model))


def test_a_projection_that_peft_has_not_saved_is_made_again(hf, tmp_path):
    peft = pytest.importorskip('peft')
    options = dict(target_modules=ALL, save_projection=False, projection_prng_key=11)
    with warnings.catch_warnings(action='ignore'):  # that it is not saved
        expected = saved_by_peft(peft, hf, tmp_path, 'vera', options)
    assert not any('vera_A' in name for name in load_file(tmp_path / WEIGHTS))
    close(logits_with(read_adapter(tmp_path), GPT.from_pretrained(hf).eval()), expected)


# Own files.

KINDS = [dict(), dict(arch='modern', bias=False)]
ROUND = [('lora', dict(rank_pattern={'c_fc': 2}, alpha_pattern={'c_fc': 3.0}, layers_to_transform=[1], dropout=0.1,
                       exclude_modules=['mlp.c_proj'])),
         ('lora', dict(use_rslora=True, target_modules='.*c_attn')), ('dora', {}),
         ('vera', dict(projection_prng_key=3)), ('bottleneck', dict(layers_to_transform=[0])),
         ('prompt', {}), ('prefix', {})]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('method, options', ROUND)
def test_write_read_write(method, options, kind, tmp_path):
    model = base(method=method, **kind)
    made = replace(adapter(method, model=model, **options), base_format='bfloat16')
    first = write(tmp_path / 'a', made, model.config)
    again = read_adapter(first)
    assert {**vars(again), 'tensors': 0, 'heads': 0} == {**vars(made), 'tensors': 0, 'heads': 0}
    second = write(tmp_path / 'b', again, model.config)
    assert json.loads((first / CONFIG).read_text()).get('fan_in_fan_out') in (None, not kind)
    assert json.loads((first / CONFIG).read_text()) == json.loads((second / CONFIG).read_text())
    tensors = [load_file(folder / WEIGHTS) for folder in (first, second)]
    assert tensors[0].keys() == tensors[1].keys() == made.tensors.keys()
    assert all(torch.equal(t, tensors[0][name]) and torch.equal(t, tensors[1][name])
               for name, t in made.tensors.items())
    for folder in (first, second):
        with safe_open(folder / WEIGHTS, 'pt') as f:
            assert f.metadata() == {'format': 'pt', 'base_hash': fingerprint(base(**kind)), 'base_format': 'bfloat16'}
        assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert torch.equal(logits_with(again, base(method=method, **kind)), logits(model))
    assert Adapter.from_saved(made.to_save(), made.tensors) == made


def test_an_adapter_is_copied_into_the_model_and_its_base_is_frozen():
    for method in ('lora', 'vera', 'prefix'):
        made, model = adapter(method), base(method=method)
        kept = {name: t.clone() for name, t in made.tensors.items()}
        put_adapter(model, made, 'a test')
        ours = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in ours) == sum(t.numel() for name, t in kept.items() if 'vera_A' not in name
                                                   and 'vera_B' not in name)
        randomise(ours)
        assert all(torch.equal(t, kept[name]) for name, t in made.tensors.items())


def edited(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != 'absent'}))
    return folder


@pytest.mark.parametrize('method, key, value', [
    ('lora', 'modules_to_save', ['lm_head']), ('lora', 'bias', 'all'), ('lora', 'lora_bias', True),
    ('lora', 'trainable_token_indices', [1, 2]), ('lora', 'layer_replication', [[0, 2]]),
    *(('lora', 'init_lora_weights', value) for value in ('pissa', 'pissa_niter_4', 'olora', 'corda', 'loftq')),
    ('lora', 'use_qalora', True), ('lora', 'megatron_config', {'a': 1}), ('lora', 'alora_invocation_tokens', [3]),
    ('lora', 'task_type', 'SEQ_CLS'), ('lora', 'a_new_key', 1), ('lora', 'peft_type', 'NOTHING'),
    ('lora', 'peft_type', 'absent'), ('lora', 'target_modules', 'absent'), ('lora', 'target_modules', []),
    ('vera', 'target_modules', None), ('vera', 'bias', 'vera_only'), ('lora', 'target_parameters', ['x']),
    ('prefix', 'prefix_projection', True), ('prompt', 'num_transformer_submodules', 2), ('lora', 'r', 0),
    ('prompt', 'modules_to_save', ['lm_head'])])
def test_settings_that_mean_something_else_are_refused_by_name(method, key, value, tmp_path):
    folder = write(tmp_path, adapter(method))
    read_adapter(folder)
    with pytest.raises(InputError, match=r'\br=0' if value == 0 else key):
        read_adapter(edited(folder, **{key: value}))


@pytest.mark.parametrize('value, named', [
    (['c_attn', 'q_proj'], 'q_proj'), (['c_attn', 'lm_head'], 'lm_head'), (['wte'], 'wte'), (['wpe'], 'wpe'),
    (r'.*(c_fc|lm_head)', 'lm_head'), ('nothing', 'nothing'), (['attn.c_attn'], 'c_proj.*unexpected')])
def test_targets_that_the_model_has_not_are_refused_by_name(value, named, tmp_path):
    folder = edited(write(tmp_path, adapter('lora')), target_modules=value)
    with pytest.raises(InputError, match=named):
        put_adapter(base(), read_adapter(folder), str(folder))


@pytest.mark.parametrize('method', ['lora', 'dora', 'vera', 'bottleneck', 'prefix'])
def test_missing_extra_and_misshaped_tensors_are_refused_by_name(method, tmp_path):
    folder = write(tmp_path, adapter(method))
    whole = load_file(folder / WEIGHTS)
    for name, tensor in whole.items():
        for tensors, message in (({k: v for k, v in whole.items() if k != name}, f'{name} is missing'),
                                 (whole | {name + 'x': tensor.clone()}, f'{name}x is unexpected'),
                                 (whole | {name: tensor[1:].clone()}, f'{name} has the shape')):
            if method == 'vera' and name == 'base_model.vera_A' and 'missing' in message:
                continue  # both of them may be missing
            save_file(tensors, folder / WEIGHTS)
            with pytest.raises(InputError, match=re.escape(message)):
                put_adapter(base(method=method), read_adapter(folder), str(folder))


@pytest.mark.parametrize('key, value', [
    ('r', '4'), ('r', 4.5), ('lora_alpha', 'x'), ('target_modules', '('), ('target_modules', 3),
    ('rank_pattern', {'(': 4}), ('rank_pattern', [1]), ('alpha_pattern', {'c_fc': 'x'}), ('layers_to_transform', 'a')])
def test_settings_that_mean_nothing_are_refused(key, value, tmp_path):
    with pytest.raises(InputError):
        put_adapter(base(), read_adapter(edited(write(tmp_path, adapter('lora')), **{key: value})), str(tmp_path))


@pytest.mark.parametrize('value', ['absent', None])
def test_without_a_scale_it_is_refused(value, tmp_path):
    with pytest.raises(InputError, match='no lora_alpha'):
        read_adapter(edited(write(tmp_path, adapter('lora')), lora_alpha=value))


@pytest.mark.parametrize('method', ['lora', 'dora', 'vera', 'bottleneck', 'prompt', 'prefix'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_tensors_in_16_bits_are_read(method, dtype, tmp_path):
    made = adapter(method)
    write(tmp_path, made)
    rounded = {name: t.to(dtype) for name, t in made.tensors.items()}
    save_file(rounded, tmp_path / WEIGHTS)
    expected = logits_with(replace(made, tensors={name: t.float() for name, t in rounded.items()}))
    assert torch.equal(logits_with(read_adapter(tmp_path)), expected)


def test_a_prefix_for_another_number_of_heads_is_refused(tmp_path):
    with pytest.raises(InputError, match='4 heads, the model has 2'):
        put_adapter(base(method='prefix', n_head=2), read_adapter(write(tmp_path, adapter('prefix'))), 'it')


@pytest.mark.parametrize('name, content, message', [
    (CONFIG, b'{"peft_type": "LO', 'damaged'), (CONFIG, b'[1]', 'peft_type'), (CONFIG, b'\xff\xfe', 'damaged'),
    (WEIGHTS, b'', 'damaged'), (WEIGHTS, 60, 'damaged'), (WEIGHTS, -8, 'damaged'), (CONFIG, None, f'no {CONFIG}'),
    (WEIGHTS, None, f'no {WEIGHTS}')])
def test_damaged_and_missing_files_are_refused(name, content, message, tmp_path):
    path = write(tmp_path, adapter('lora')) / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path)


def test_a_file_that_cannot_be_written_is_an_input_error(tmp_path):
    for name in (WEIGHTS, CONFIG):
        (tmp_path / name / f'{name}.tmp').mkdir(parents=True)
        with pytest.raises(InputError, match='could not write'):
            write(tmp_path / name, adapter('lora'))
    (tmp_path / 'file').touch()
    with pytest.raises(InputError, match='could not write'):
        write(tmp_path / 'file', adapter('lora'))
