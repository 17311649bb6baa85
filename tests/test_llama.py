"""Llama, Mistral, Qwen2 and Qwen3: read as transformers reads them, and written back as they were."""

import json
import pathlib

import pytest
import torch
import transformers
from conftest import write_tokens
from safetensors.torch import load_file, save_file
from test_tokenizer_hf import bytes_bpe, write_folder

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.exports.hf import write_hf
from sologpt.exports.source import read_exported_model
from sologpt.files.checkpoint import load_weights
from sologpt.files.hf_models import read_hf_model, to_theirs
from sologpt.files.llama import LLAMAS, find_llama
from sologpt.files.models import read_model

IDS = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))
BASE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.2)
TIED, WINDOW = dict(tie_word_embeddings=True), dict(sliding_window=8)


def rope(kind, theta, factor, **more):
    return dict(rope_parameters={'rope_type': kind, 'rope_theta': theta, 'factor': factor, **more})


YARN = rope('yarn', 1e6, 4.0, original_max_position_embeddings=16)
LLAMA3 = rope('llama3', 5e5, 32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
GRID = [
    ('llama', dict(num_key_value_heads=6)), ('llama', dict(num_key_value_heads=1)),
    ('llama', TIED | dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3)),
    ('llama', dict(head_dim=16, attention_bias=True, mlp_bias=True)), ('llama', dict(attention_bias=True)),
    ('llama', dict(mlp_bias=True, rms_norm_eps=1e-6)), ('llama', rope('linear', 1e4, 4.0)),
    ('llama', rope('yarn', 1e4, 4.0, original_max_position_embeddings=16)),
    ('llama', TIED | LLAMA3 | dict(max_position_embeddings=128)),
    ('llama', rope('dynamic', 1e4, 2.0) | dict(max_position_embeddings=40)),
    ('mistral', WINDOW), ('mistral', dict(sliding_window=None, head_dim=16)),
    ('qwen2', TIED | WINDOW), ('qwen2', WINDOW | dict(use_sliding_window=True, max_window_layers=1)),
    ('qwen3', TIED | dict(head_dim=16)), ('qwen3', YARN),
    ('qwen3', WINDOW | dict(head_dim=16, use_sliding_window=True, attention_bias=True,
                            layer_types=['full_attention', 'sliding_attention', 'full_attention'])),
]


def tiny(kind, **changes):
    """A model of transformers with random weights, gains and biases."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **BASE | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.3 * torch.randn(p.shape)
    return model


@torch.no_grad()
def close(source, theirs, ids=IDS):
    found, expected = GPT.from_pretrained(str(source)).eval()(ids, ids)[0], theirs(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def change(folder, **changes):
    """Write keys of config.json; ... removes one."""
    path = pathlib.Path(folder, 'config.json')
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


# ---- the same logits and text ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, changes', GRID)
@torch.no_grad()
def test_logits_and_greedy_text_are_transformers(tmp_path, kind, changes):
    theirs = tiny(kind, **changes)
    theirs.save_pretrained(tmp_path)
    close(tmp_path, theirs)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    expected = theirs.generate(IDS[:, :5], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0,
                               attention_mask=torch.ones(2, 5))
    assert torch.equal(ours.generate(IDS[:, :5], 30, temperature=0), expected)


@pytest.mark.parametrize('kind, changes', [GRID[2], GRID[10], GRID[12], GRID[14]])
def test_gradients_are_transformers(tmp_path, kind, changes):
    theirs = tiny(kind, **changes)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    loss = theirs(IDS, labels=IDS).loss
    loss.backward()
    targets = torch.cat([IDS[:, 1:], torch.full((2, 1), -1)], dim=1)
    own_loss = ours.loss(IDS, targets)
    own_loss.backward()
    assert own_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    grads = {name: p.grad for name, p in ours.named_parameters()}
    if ours.config.tied:
        grads['transformer.wte.weight'] = grads['lm_head.weight'] = ours.lm_head.weight.grad
    found = dict(to_theirs(LLAMAS[kind], ours.config, grads, 97))
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_transformers(tmp_path):
    theirs = tiny('llama', hidden_size=96, max_position_embeddings=2048, initializer_range=0.1)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(97, (1, 1500), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = ours(ids, ids)[0]
    error, their_error = ((z.float() - expected).square().mean().sqrt() for z in (found, theirs.bfloat16()(ids).logits))
    assert error < 1.05 * their_error


# ---- what is silently wrong if it is wrong ---------------------------------------------------------------------------

def test_an_absent_key_is_not_a_null(tmp_path):
    tiny('mistral', **WINDOW, head_dim=8).save_pretrained(tmp_path)
    for value, expected in ((None, None), (..., 4096), (5, 5)):
        change(tmp_path, sliding_window=value)
        assert read_model(str(tmp_path))[0]['window'] == expected
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert theirs.config.sliding_window == expected
    change(tmp_path, num_key_value_heads=None)
    assert read_model(str(tmp_path))[0]['n_kv_head'] == 6


@pytest.mark.parametrize('kind', LLAMAS)
def test_absent_keys_mean_what_transformers_says(kind):
    sizes = dict(hidden_size=256, num_attention_heads=32, intermediate_size=64, num_hidden_layers=40, vocab_size=9,
                 max_position_embeddings=64)
    theirs = transformers.AutoConfig.for_model(kind, **sizes)
    config = GPTConfig(**LLAMAS[kind].read_config(sizes, 'x'))
    assert config.n_kv_head == theirs.num_key_value_heads and config.norm_eps == theirs.rms_norm_eps
    assert config.head_dim == (getattr(theirs, 'head_dim', None) or 8) and config.tied == theirs.tie_word_embeddings
    assert config.rope_base == theirs.rope_parameters['rope_theta'] and config.window == theirs.sliding_window \
        if kind != 'llama' else config.window is None


def test_rope_as_before_transformers_5(tmp_path):
    theirs = tiny('llama', **LLAMA3)
    theirs.save_pretrained(tmp_path)
    scaling = dict(theirs.config.rope_parameters)
    base = scaling.pop('rope_theta')
    change(tmp_path, rope_parameters=..., rope_theta=base, rope_scaling=scaling)
    close(tmp_path, theirs)
    scaling['type'] = scaling.pop('rope_type')
    change(tmp_path, rope_scaling=scaling)
    close(tmp_path, theirs)
    change(tmp_path, rope_scaling=None)
    with pytest.raises(AssertionError):
        close(tmp_path, theirs)


def test_a_stored_head_under_a_tied_flag(tmp_path):
    """transformers ties them only if they are equal."""
    tiny('llama', **TIED).save_pretrained(tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    table = weights['model.embed_tokens.weight']
    for head, is_tied in ((table.clone(), True), (table + torch.randn_like(table), False)):
        save_file(weights | {'lm_head.weight': head}, tmp_path / 'model.safetensors', {'format': 'pt'})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        close(tmp_path, theirs)
        assert GPT.from_pretrained(str(tmp_path)).config.tied == is_tied


def test_parts_are_split_by_their_own_sizes(tmp_path):
    theirs = tiny('qwen3', head_dim=16)
    theirs.save_pretrained(tmp_path)
    config, weights, _, _ = read_hf_model(str(tmp_path))
    config = GPTConfig(**config)
    assert config.parts_of('attn.c_attn') == [96, 32, 32] and config.parts_of('mlp.c_fc') == [80, 80]
    q, k, v = weights['transformer.h.1.attn.c_attn.weight'].split(config.parts_of('attn.c_attn'))
    attention = theirs.model.layers[1].self_attn
    for part, linear in ((q, attention.q_proj), (k, attention.k_proj), (v, attention.v_proj)):
        assert torch.equal(part, linear.weight)
    model = GPT(config)
    cache = model.new_cache(1, 12)
    model.next_logits(IDS[:1, :12], cache)
    assert cache.layers[0].k.shape == (1, 2, 12, 16)  # of the heads of keys, not of queries
    without = 6 * sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and 'wte' not in name)
    assert model.flops_per_token(64) - without == 12 * 3 * 6 * 16 * 64
    windowed = GPTConfig.from_saved(config.to_save() | dict(window=8, windowed=[1]))
    assert GPT(windowed).flops_per_token(64) - without == 12 * 6 * 16 * (64 + 8 + 64)


def test_one_table_of_rotary_positions_serves_all_blocks():
    model = GPT(GPTConfig(arch='llama', block_size=131072, vocab_size=32, n_layer=4, n_head=2, n_embd=16))
    assert sum(buffer.numel() for buffer in model.buffers()) == 4  # and it does not grow with the positions


def test_weights_stay_in_the_files_dtype_until_they_are_used(tmp_path):
    tiny('llama').bfloat16().save_pretrained(tmp_path)
    config, weights, _, _ = read_hf_model(str(tmp_path))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    model = GPT.skeleton(GPTConfig(**config))
    load_weights(model, weights, 'x', kept=(torch.bfloat16,))
    dtypes = {p.dim(): p.dtype for p in model.parameters()}
    assert dtypes == {1: torch.float32, 2: torch.bfloat16}


# ---- files -----------------------------------------------------------------------------------------------------------

def fill(folder, kind, dtype, **changes):
    """A model's folder in several files, with a tokenizer that this project cannot read, and a template."""
    model = tiny(kind, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size='40KB')
    for name in ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'vocab.json'):
        (folder / name).write_text(json.dumps({'name': name, 'é': [1, None]}, indent=3) + '\n\n')
    (folder / 'tokenizer.model').write_bytes(bytes(range(256)))
    (folder / 'chat_template.jinja').write_text('{{ messages }}\r\n')
    return model


@pytest.mark.parametrize('kind, changes', [GRID[2], GRID[3], GRID[11], GRID[13], GRID[16]])
def test_export_gives_back_every_byte(tmp_path, kind, changes):
    model = fill(tmp_path / 'a', kind, torch.bfloat16, **changes)
    files = {path.name: path.read_bytes() for path in (tmp_path / 'a').iterdir() if 'model-' not in path.name}
    files.pop('model.safetensors.index.json')
    for source, dest in (('a', 'b'), ('b', 'c')):
        (tmp_path / dest).mkdir()
        exported = read_exported_model(str(tmp_path / source), [], merges=False)
        write_hf(exported, str(tmp_path / dest), 'hf', dest, exported.usual_dtype, '')
    found = {path.name: path.read_bytes() for path in (tmp_path / 'c').iterdir() if path.name != 'README.md'}
    written = load_file(tmp_path / 'c' / 'model.safetensors')
    assert found.keys() == files.keys() | {'model.safetensors'}
    assert all(found[name] == content for name, content in files.items())
    expected = {name: tensor for name, tensor in model.state_dict().items()
                if name != 'lm_head.weight' or not model.config.tie_word_embeddings}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) and written[name].dtype == torch.bfloat16
               for name, tensor in expected.items())
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)(IDS).logits for name in 'ac')
    assert torch.equal(before, after)


def test_another_dtype_is_named_in_config_json(tmp_path):
    fill(tmp_path / 'a', 'llama', torch.bfloat16)
    exported = read_exported_model(str(tmp_path / 'a'), [], merges=False)
    (tmp_path / 'b').mkdir()
    write_hf(exported, str(tmp_path / 'b'), 'hf', 'b', 'float16', '')
    before, after = (json.loads((tmp_path / name / 'config.json').read_text()) for name in 'ab')
    assert after == before | {'dtype': 'float16'} and list(after) == list(before)
    assert load_file(tmp_path / 'b' / 'model.safetensors')['model.norm.weight'].dtype == torch.float16


def test_a_finetuned_model_keeps_the_files_of_its_origin(project):
    fill(pathlib.Path('base'), 'qwen2', torch.bfloat16, **TIED, num_hidden_layers=2)
    write_tokens(pathlib.Path('data/own'), *([i % 90 for i in range(2000)] for _ in range(2)), vocab_size=97)
    few = dict(init_from='base', dataset='own', block_size=16, max_iters=2)
    project._in_process('train.py', [f'--{k}={v}' for k, v in dict(
        out_dir='out', device='cpu', dtype='float32', peak_flops=1e12, eval_iters=1, eval_interval=1, batch_size=2,
        gradient_accumulation_steps=1, warmup_iters=1, learning_rate=1e-3, **few).items()])
    exported = read_exported_model('out', [], merges=False)
    assert exported.config.block_size == 64  # rotary positions are not cut off
    pathlib.Path('hf').mkdir()
    write_hf(exported, 'hf', 'hf', 'hf', exported.usual_dtype, '')
    for name in ('config.json', 'tokenizer.json', 'tokenizer.model', 'chat_template.jinja', 'generation_config.json'):
        assert pathlib.Path('hf', name).read_bytes() == pathlib.Path('base', name).read_bytes()
    trained, before = (transformers.AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ('hf', 'base'))
    assert all((trained[name] != tensor).any() for name, tensor in before.items())
    _, said = project.resume(max_iters=3)
    assert 'iter 2:' in said


def test_from_an_adapter_to_one_file_for_llama_cpp(project):
    """A base, a LoRA trained on it, and export.py --to=gguf, which merges it; read back by transformers."""
    pytest.importorskip('gguf')
    write_folder(pathlib.Path('base'), bytes_bpe(bos=False))
    text = transformers.AutoTokenizer.from_pretrained('base')
    tiny('llama', num_hidden_layers=2, vocab_size=len(text) + 5, hidden_size=96).save_pretrained('base')
    folder = pathlib.Path('data/own')
    write_tokens(folder, *([i % 90 for i in range(2000)] for _ in range(2)), vocab_size=len(text),
                 tokenizer=read_model('base')[2]['tokenizer'])
    project._in_process('train.py', [f'--{key}={value}' for key, value in dict(
        init_from='base', dataset='own', block_size=16, max_iters=2, out_dir='out', device='cpu', dtype='float32',
        peak_flops=1e12, eval_iters=1, eval_interval=1, batch_size=2, gradient_accumulation_steps=1, warmup_iters=1,
        learning_rate=0.1, adapter='lora', adapter_targets='q_proj,up_proj').items()])
    _, said = project._in_process('export.py', ['--to=gguf', '--adapters=out', '--dest=gguf', '--dtype=float32'])
    assert 'llama in float32 for llama.cpp' in said
    project._in_process('export.py', ['--to=merged', '--adapters=out', '--dest=merged'])
    theirs = transformers.AutoModelForCausalLM.from_pretrained('gguf', gguf_file='model.gguf', dtype=torch.float32)
    close('merged', theirs.eval())
    base = GPT.from_pretrained('base').eval()
    assert (base(IDS, IDS)[0] - theirs(IDS).logits).abs().max() > 0.1
    with pytest.raises(InputError, match="dtype='q8_0' is not known"):
        project._in_process('export.py', ['--to=hf', '--adapters=out', '--dest=x', '--dtype=q8_0'])


@pytest.mark.parametrize('kind, parts', [
    ('llama', {}), ('llama', dict(n_kv_head=1, tied=True, n_inner=40, rope_base=5e5)), ('qwen2', dict(bias='qkv')),
    ('qwen3', dict(qk_norm='gain', head_dim=4))])
@torch.no_grad()
def test_a_model_from_scratch_in_transformers(tmp_path, kind, parts):
    torch.manual_seed(0)
    config = GPTConfig(arch='llama', block_size=32, vocab_size=64, n_ids=50, n_layer=2, n_head=4, n_embd=32, **parts)
    model = GPT(config)
    for p in model.parameters():
        p += 0.2 * torch.randn(p.shape)
    torch.save({'model': model.state_dict(), 'model_args': config.to_save(), 'iter_num': 0,
                'tokenizer': {'kind': 'chars', 'chars': [chr(97 + i) for i in range(50)]}}, tmp_path / 'ckpt.pt')
    exported = read_exported_model(str(tmp_path / 'ckpt.pt'), [], merges=False)
    assert find_llama(config) == kind
    (tmp_path / 'hf').mkdir()
    write_hf(exported, str(tmp_path / 'hf'), 'hf', 'hf', 'float32', '')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    assert theirs.config.model_type == kind
    ids = torch.randint(50, (2, 32), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(theirs(ids).logits, model.eval()(ids, ids)[0][..., :50], atol=1e-4, rtol=0)
    again, before = GPT.from_pretrained(str(tmp_path / 'hf')).config.to_save(), config.to_save()
    assert before.pop('n_ids') == 50 and again == before | {'vocab_size': 50}


def test_padding_of_the_table_is_kept_and_never_drawn(tmp_path):
    text = bytes_bpe(bos=False)
    model = tiny('qwen2', vocab_size=text.get_vocab_size() + 50)
    write_folder(tmp_path, text)
    model.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    assert ours.config.n_ids == text.get_vocab_size() and len(ours.lm_head.weight) == ours.config.n_ids + 50
    with torch.no_grad():
        ours.lm_head.weight[ours.config.n_ids:] = 100 * ours.lm_head.weight[:50]
    drawn = ours.generate(IDS[:, :4], 40, temperature=2.0)
    assert drawn.max() < ours.config.n_ids


# ---- refusals --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, changes, message', [
    ('llama', dict(hidden_act='gelu'), "hidden_act='gelu'"),
    ('llama', dict(rope_parameters={'rope_type': 'longrope', 'rope_theta': 1e4}), "rope_type='longrope'"),
    ('llama', dict(rope_parameters={'rope_type': 'llama3', 'rope_theta': 1e4, 'factor': 2.0}), 'no low_freq_factor'),
    ('llama', dict(partial_rotary_factor=0.5), 'partial_rotary_factor=0.5'),
    ('llama', dict(quantization_config={'bits': 4}), 'quantization_config='),
    ('llama', dict(num_key_value_heads=4), 'n_head=6 is not divisible by n_kv_head=4'),
    ('llama', dict(num_hidden_layers='3'), "num_hidden_layers='3', which cannot be"),
    ('llama', dict(max_position_embeddings=...), 'no max_position_embeddings'),
    ('llama', dict(model_type='gemma'), "model_type='gemma'; only gpt2, opt, apertus, llama, mistral, qwen2, qwen3"),
    ('qwen3', dict(model_type='llama'), 'self_attn.q_norm.weight is unexpected|self_attn.k_norm.weight is unexpected'),
    ('llama', dict(model_type='qwen3'), 'self_attn.q_norm.weight is missing'),
    ('llama', dict(intermediate_size=64), 'has the shape'),
    ('llama', dict(attention_bias=True), 'attn.c_attn.bias is missing'),
])
def test_what_has_no_place_here(tmp_path, kind, changes, message):
    tiny(kind).save_pretrained(tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        GPT.from_pretrained(str(tmp_path))
