"""Adapters of models whose Linears have names of their own in files: what peft trains is read, and the other way."""

import copy
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_peft_files import close, loaded_by, randomise, write

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.adapters.adapter import Adapter, attach, merge, model_class, parts, put_adapter, tensors_of
from sologpt.adapters.arithmetic import for_family, low_rank_matrices, stack
from sologpt.adapters.bank import Bank
from sologpt.adapters.base import load_base
from sologpt.adapters.config import AdapterConfig
from sologpt.adapters.peft_files import CONFIG, WEIGHTS, read_adapter
from sologpt.adapters.targets import named_linears, short_names
from sologpt.files.checkpoint import save_checkpoint
from sologpt.files.families import FAMILIES
from sologpt.matmuls.held import hold_base
from sologpt.tokens.tokenizer import Bytes

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning')  # of transformers about itself
peft = pytest.importorskip('peft')
P = 3
IDX = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(7))
SHORT = IDX[:, :9] % 33
BASE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2)
FAMILY = {'llama': {}, 'mistral': dict(sliding_window=8), 'qwen2': dict(tie_word_embeddings=True),
          'qwen3': dict(head_dim=16)}
SEVEN = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    """Family -> the folder of a model of transformers, all of whose weights are random."""
    folders = {}
    for name, changes in FAMILY.items():
        cls = getattr(transformers, FAMILIES[name].cls)
        model = cls(cls.config_class(**BASE | changes))
        randomise(model.parameters(), std=0.2)
        with torch.no_grad():
            for norm_or_bias in (p for p in model.parameters() if p.dim() == 1):
                norm_or_bias += 0.5
        folders[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[name])
    return folders


def base(**changes):
    """A small model of ours."""
    m = GPT(GPTConfig(**dict(arch='llama', block_size=32, vocab_size=33, n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
                             n_inner=48) | changes)).eval()
    randomise(m.parameters(), std=0.3)
    return m


@torch.no_grad()
def logits(m, idx=IDX):
    return m.lm_head(m.eval().hidden(idx))


CASES = {
    'all': ('lora', {}),
    'q': ('lora', dict(target_modules=['q_proj'])),
    'q_v': ('lora', dict(target_modules=['q_proj', 'v_proj'])),
    'all-linear': ('lora', dict(target_modules='all-linear')),
    'regex': ('lora', dict(target_modules=r'model\.layers\.\d\.(self_attn\.k_proj|mlp\.(up|down)_proj)')),
    'rslora': ('lora', dict(use_rslora=True)),
    'rslora_patterns': ('lora', dict(use_rslora=True, rank_pattern={'q_proj': 2, r'layers\.1\.mlp\.up_proj': 6},
                                     alpha_pattern={'self_attn.v_proj': 3.0, 'up_proj': 5.0, 'q_proj': 1.0})),
    'layers': ('lora', dict(target_modules=['v_proj', 'gate_proj'], layers_to_transform=[1], layers_pattern='layers')),
    'exclude': ('lora', dict(exclude_modules=['k_proj', 'down_proj'])),
    'dora': ('dora', {}),
    'dora_v': ('dora', dict(target_modules=['v_proj', 'up_proj'], rank_pattern={'up_proj': 2}, use_rslora=True)),
    'vera': ('vera', dict(projection_prng_key=5)),
    'vera_v': ('vera', dict(target_modules=['v_proj'])),
    'prompt': ('prompt', {}),
    'prefix': ('prefix', {}),
}
# all cases of one family, and of the others those in which they differ
SEEN = [*(('llama', case) for case in CASES), *((family, case) for family in ('mistral', 'qwen2', 'qwen3')
                                                for case in ('all', 'dora_v', 'vera', 'prompt', 'prefix'))]


def peft_config(method, options):
    if method == 'prompt':
        return peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=P)
    if method == 'prefix':
        return peft.PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=P)
    options = dict(target_modules=SEVEN) | options
    if method == 'vera':
        return peft.VeraConfig(task_type='CAUSAL_LM', r=4, **options)
    return peft.LoraConfig(task_type='CAUSAL_LM', r=4, lora_alpha=8.0, use_dora=method == 'dora', **options)


def with_peft(folder, method, options):
    """A model of transformers with an untrained adapter of peft, all of whose tensors are random."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = peft.get_peft_model(model, peft_config(method, options)).eval()
    randomise([p for p in model.parameters() if p.requires_grad], seed=1)
    return model


@torch.no_grad()
def peft_logits(model, method):
    return model.eval()(input_ids=IDX).logits[:, P if method == 'prompt' else 0:]


def adapter(model, method, **options):
    """An adapter with random tensors, which is put to the model."""
    size = {'num_virtual_tokens': P} if method in ('prompt', 'prefix') else {'r': 4}
    config = AdapterConfig(method, **size | options)
    attach(model, config)
    randomise([p for p in model.parameters() if p.requires_grad], seed=1)
    return Adapter(config, {name: t.clone() for name, t in tensors_of(model).items()}, 'somewhere')


# Both ways.

@pytest.mark.parametrize('family, case', SEEN)
def test_what_peft_writes_is_read(family, case, bases, tmp_path):
    method, options = CASES[case]
    theirs = with_peft(bases[family], method, options)
    theirs.save_pretrained(tmp_path)
    expected, found = peft_logits(theirs, method), read_adapter(tmp_path)
    model, _ = load_base([found])
    assert (expected - logits(model)).abs().max() > 0.1
    put_adapter(model, found, str(tmp_path))
    close(logits(model), expected)


@pytest.mark.parametrize('family, case', SEEN)
def test_what_is_written_is_read_by_peft(family, case, bases, tmp_path):
    method, options = CASES[case]
    options = {key: value for key, value in options.items() if key != 'layers_pattern'}
    cls = model_class(AdapterConfig(method))
    model = cls.from_pretrained(bases[family])
    made = replace(adapter(model, method, **options), base=bases[family])
    write(tmp_path, made, model.config)
    theirs = loaded_by(peft, transformers.AutoModelForCausalLM.from_pretrained(bases[family]), tmp_path)
    assert peft.get_peft_model_state_dict(theirs).keys() == load_file(tmp_path / WEIGHTS).keys() == made.tensors.keys()
    close(peft_logits(theirs, method), logits(model))
    again = cls.from_pretrained(bases[family])
    put_adapter(again, read_adapter(tmp_path), str(tmp_path))
    assert torch.equal(logits(again), logits(model))
    assert json.loads((tmp_path / CONFIG).read_text()).get('fan_in_fan_out') in (None, False)


@pytest.mark.parametrize('case', ['q', 'rslora_patterns', 'dora_v', 'vera', 'prefix'])
def test_gradients_are_those_of_peft(case, bases, tmp_path):
    method, options = CASES[case]
    theirs = with_peft(bases['qwen3'], method, options)
    theirs.save_pretrained(tmp_path)
    theirs(input_ids=IDX).logits[:, :-1].log_softmax(-1).gather(2, IDX[:, 1:, None]).mean().neg().backward()
    found = read_adapter(tmp_path)
    model = model_class(found.config).from_pretrained(bases['qwen3'])
    put_adapter(model, found, str(tmp_path))
    model.loss(IDX[:, :-1], IDX[:, 1:]).backward()
    if method == 'prefix':
        close_gradients(model.virtual.grad, theirs.prompt_encoder['default'].embedding.weight.grad)
        return
    expected = {name.replace('.default', '').replace('vector.weight', 'vector'): p.grad
                for name, p in theirs.named_parameters() if p.requires_grad}
    ours = {name: getattr(*place).grad for _, part in parts(model) for name, place in part.file_tensors().items()
            if 'base_model.vera' not in name}
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        close_gradients(ours[name], grad)


def close_gradients(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# Names.

def test_a_part_is_a_range_of_rows():
    rows = {one.name.removeprefix('model.layers.1.'): (one.linear, one.rows.start, one.rows.stop)
            for one in named_linears(base()) if one.block == 1}
    attn, mlp = 'transformer.h.1.attn', 'transformer.h.1.mlp'
    assert rows == {
        'self_attn.q_proj': (f'{attn}.c_attn', 0, 32), 'self_attn.k_proj': (f'{attn}.c_attn', 32, 48),
        'self_attn.v_proj': (f'{attn}.c_attn', 48, 64), 'self_attn.o_proj': (f'{attn}.c_proj', 0, 32),
        'mlp.gate_proj': (f'{mlp}.c_fc', 0, 48), 'mlp.up_proj': (f'{mlp}.c_fc', 48, 96),
        'mlp.down_proj': (f'{mlp}.c_proj', 0, 32)}
    assert [one.name for one in named_linears(base()) if one.block is None] == ['model.embed_tokens', 'lm_head']
    assert short_names(base().config) == SEVEN
    for arch in ('gpt2', 'modern'):
        named = named_linears(GPT.skeleton(GPTConfig(arch=arch, n_layer=2)))
        assert all(one.name == one.linear for one in named) and len([one for one in named if one.block == 1]) == 4


def test_the_default_is_every_linear_or_those_that_write_to_the_residual_stream():
    for method, expected in (('lora', SEVEN), ('vera', SEVEN), ('bottleneck', ['o_proj', 'down_proj'])):
        model, config = base(), AdapterConfig(method)
        attach(model, config)
        assert config.target_modules == expected
        assert len([target for _, part in parts(model) for target in part.targets]) == 2 * len(expected)


@pytest.mark.parametrize('targets, message', [
    (['c_attn'], "'c_attn', which this model does not have: it has q_proj, k_proj, v_proj, o_proj, gate_proj"),
    ('attn.c_attn', 'matches no Linear of this model: it has q_proj'), (['embed_tokens'], 'model.embed_tokens: only'),
    (['q_proj', 'lm_head'], 'lm_head: only Linears of blocks'), ('.*', 'model.embed_tokens, lm_head: only')])
def test_targets_are_named_as_in_files(targets, message):
    with pytest.raises(InputError, match=message):
        attach(base(), AdapterConfig('lora', target_modules=targets))


def test_a_lora_of_q_proj_changes_its_rows_alone():
    model, plain, x = base(), base(), torch.randn(2, 5, 32)
    adapter(model, 'lora', target_modules=['q_proj'])
    for name, part in parts(model):
        assert name.endswith('attn.c_attn') and part.A[0].shape == (4, 32) and part.B[0].shape == (32, 4)
        y, former = part(x), plain.get_submodule(name)(x)
        assert torch.equal(y[..., 32:], former[..., 32:]) and (y - former)[..., :32].abs().min() > 0


# Merging, summing, serving.

BY_PARTS = [('lora', {}), ('lora', dict(target_modules=['q_proj'])),
            ('dora', dict(target_modules=['k_proj', 'up_proj'])),
            ('lora', dict(use_rslora=True, target_modules=['v_proj', 'down_proj'], rank_pattern={'v_proj': 2})),
            ('vera', dict(target_modules=['q_proj', 'v_proj', 'gate_proj']))]
BY_PARTS_SUMMED = [case for case in BY_PARTS if case[0] != 'dora']


@pytest.mark.parametrize('held', ['float32', 'nf4'])
@pytest.mark.parametrize('method, options', BY_PARTS)
def test_merged_logits_equal_unmerged(method, options, held):
    model = base(bias='qkv')
    hold_base(model, held, 'float32')
    plain = logits(model, SHORT)
    adapter(model, method, **options)
    unmerged, changes = logits(model, SHORT), {name: part.delta().detach() for name, part in parts(model)}
    weights = {name: part.base.weight.detach().clone() for name, part in parts(model)}
    merge(model)
    close(logits(model, SHORT), unmerged)
    assert (unmerged - plain).abs().max() > 0.1 and not parts(model)
    for name, change in changes.items():
        assert torch.equal(model.get_submodule(name).weight, weights[name] + change)


def test_the_rows_of_a_batch_have_adapters_of_other_targets_and_ranks():
    made = [adapter(base(), method, **options) for method, options in BY_PARTS_SUMMED]
    model = base()
    bank = Bank(model, [low_rank_matrices(model.config, one, 'it') for one in made], torch.float32)
    # no Linear has more ranks than the adapter with the most there
    assert {name.split('.', 3)[3]: r for name, r in bank.ranks.items()} == {
        'attn.c_attn': 12, 'attn.c_proj': 4, 'mlp.c_fc': 8, 'mlp.c_proj': 4}
    numbers = [2, 0, 4, 1, 3]
    bank.select(numbers)
    found = logits(model, SHORT[:1].expand(5, -1))
    for row, number in zip(found, numbers, strict=True):
        alone = base()
        if number:
            put_adapter(alone, made[number - 1], 'it')
        close(row, logits(alone, SHORT[:1])[0])


@pytest.mark.parametrize('numbers', [[0, 2], [1, 3], [1, 2, 1]])
def test_a_stack_adds_up_the_changes_by_parts(numbers, bases, tmp_path):
    plain, weights = GPT.from_pretrained(bases['llama']), [0.5, -1.0, 2.0][:len(numbers)]
    made = [adapter(copy.deepcopy(plain), *case[:1], **case[1]) for case in (BY_PARTS_SUMMED[n] for n in numbers)]
    merged = copy.deepcopy(plain)
    for one, weight in zip(made, weights, strict=True):
        put_adapter(merged, one, 'it')
        merge(merged, weight)
    stacked = stack(plain.config, made, weights, ['it'] * len(made))
    targets = stacked.config.target_modules
    assert targets == SEVEN if 0 in numbers else all(name.startswith('model.layers.') for name in targets)
    model = copy.deepcopy(plain)
    put_adapter(model, stacked, 'it')
    close(logits(model), logits(merged))
    write(tmp_path, replace(stacked, base=bases['llama']), plain.config)
    theirs = loaded_by(peft, transformers.AutoModelForCausalLM.from_pretrained(bases['llama']), tmp_path)
    close(peft_logits(theirs, 'lora'), logits(merged))


def test_an_adapter_of_such_a_model_is_exported_as_it_is():
    model = base()
    made = adapter(model, 'dora', target_modules=['v_proj'])
    assert for_family(model.config, made, FAMILIES['llama'], 'it') is made
    with pytest.raises(InputError, match='peft does not have'):
        for_family(model.config, Adapter(AdapterConfig('bottleneck'), {}), FAMILIES['llama'], 'it')


@pytest.mark.parametrize('method', ['prompt', 'prefix'])
def test_virtual_tokens_for_other_heads_are_refused(method, tmp_path):
    model = model_class(AdapterConfig(method))(base().config)
    write(tmp_path, adapter(model, method), model.config)
    heads, other = {'prompt': (4, dict(n_head=2, n_kv_head=2)), 'prefix': (2, dict(n_kv_head=1))}[method]
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert settings['num_attention_heads'] == heads
    assert settings['token_dim'] == {'prompt': 32, 'prefix': 16}[method]
    wrong = type(model)(base(**other).config)
    with pytest.raises(InputError, match=f'is for {heads} heads, the model has {heads // 2}'):
        put_adapter(wrong, read_adapter(tmp_path), 'it')


@pytest.mark.parametrize('key, value', [
    ('modules_to_save', ['lm_head']), ('trainable_token_indices', [1]), ('lora_bias', True), ('bias', 'lora_only'),
    ('target_parameters', ['x']), ('layer_replication', [[0, 2]]), ('layers_pattern', 'blocks'),
    *(('init_lora_weights', value) for value in ('pissa', 'olora', 'loftq', 'corda'))])
def test_settings_that_mean_something_else_are_refused(key, value, tmp_path):
    model = base()
    write(tmp_path, adapter(model, 'lora'), model.config)
    settings = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(settings | {key: value}))
    with pytest.raises(InputError, match=key):
        read_adapter(tmp_path)


def test_a_run_trains_resumes_and_samples_with_parts(project):
    model = base(vocab_size=256, block_size=16)
    os.mkdir('base')
    save_checkpoint('base', {'model': model.state_dict(), 'model_args': model.config.to_save(), 'iter_num': 0,
                             'tokenizer': Bytes().to_dict()}, best=False)
    keys = dict(init_from='base', adapter='lora', adapter_r=2, adapter_targets='q_proj,v_proj', loraplus_lr_ratio=4.0,
                n_head=4, weight_decay=0.0)
    trained, _ = project.train(**keys)
    [(name, part), _] = parts(trained['model'])
    assert name == 'transformer.h.0.attn.c_attn' and all(B.abs().sum() > 0 for B in part.B)
    _, printed = project.resume(max_iters=8)
    assert 'iter 8' in printed
    found = read_adapter('out')
    assert found.config.target_modules == ['q_proj', 'v_proj'] and len(found.tensors) == 8
    assert project.sample(temperature=0) != project.sample(out_dir='base', temperature=0)
