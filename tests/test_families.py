"""Models that others have written, read here."""

import json
import math

import huggingface_hub
import pytest
import tokenizers
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.files.models import read_model
from sologpt.tokens import data_folder

IDS = torch.randint(37, (2, 20), generator=torch.Generator().manual_seed(0))


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'q_norm' not in name and 'k_norm' not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (1.0 if 'norm' in name else 0.0))
    return model.eval()


def gpt2(**changes):
    return randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**dict(
        vocab_size=37, n_positions=24, n_embd=32, n_layer=3, n_head=4) | changes)))


def opt(**changes):
    return randomise(transformers.OPTForCausalLM(transformers.OPTConfig(**dict(
        vocab_size=37, max_position_embeddings=24, hidden_size=32, word_embed_proj_dim=32, ffn_dim=128,
        num_hidden_layers=2, num_attention_heads=4, activation_function='gelu', dropout=0.0) | changes)))


def apertus(**changes):
    """With gains in its norms, ReLU squared, and what else its files may have."""
    return randomise(transformers.ApertusForCausalLM(transformers.ApertusConfig(**dict(
        vocab_size=37, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=24, hidden_act='relu2', rms_norm_eps=1e-6,
        rope_parameters={'rope_type': 'default', 'rope_theta': 10000.0}) | changes)))


def xielu(alpha_p=0.7, alpha_n=-20.0, beta=0.0, **changes):
    model = apertus(hidden_act='xielu', **changes)
    for layer in model.model.layers:
        act = layer.mlp.act_fn
        for tensor, value in ((act.alpha_p, alpha_p), (act.alpha_n, alpha_n), (act.beta, beta)):
            tensor.data.fill_(value)
    return model


@torch.no_grad()
def close(source, theirs):
    found, expected = GPT.from_pretrained(str(source)).eval()(IDS, IDS)[0], theirs(IDS).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('make', [
    gpt2, lambda: gpt2(tie_word_embeddings=False, activation_function='relu2'), opt,
    lambda: opt(tie_word_embeddings=False, activation_function='gelu_new'), apertus,
    lambda: apertus(hidden_act='gelu', num_key_value_heads=2, intermediate_size=96), xielu,
    lambda: xielu(alpha_p=math.log(math.e - 1), alpha_n=-40.0)])
def test_others_models(tmp_path, make):
    theirs = make()
    theirs.save_pretrained(tmp_path)
    close(tmp_path, theirs)


def test_a_tied_apertus(tmp_path):
    theirs = apertus(tie_word_embeddings=True)
    theirs.model.norm.weight.data.fill_(1.0)
    theirs.save_pretrained(tmp_path)
    close(tmp_path, theirs)


@pytest.mark.parametrize('make', [gpt2, opt, apertus])
def test_in_several_files_and_16_bits(tmp_path, make):
    make().bfloat16().save_pretrained(tmp_path, max_shard_size='20KB')
    assert len(list(tmp_path.glob('model-*.safetensors'))) > 2
    close(tmp_path, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())
    index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
    (tmp_path / sorted(set(index['weight_map'].values()))[1]).unlink()
    with pytest.raises(InputError, match='it has no model-00002'):
        GPT.from_pretrained(str(tmp_path))


def test_a_file_that_the_index_does_not_describe(tmp_path):
    gpt2().save_pretrained(tmp_path, max_shard_size='20KB')
    path = tmp_path / 'model.safetensors.index.json'
    index = json.loads(path.read_text())
    index['weight_map'].pop('transformer.wpe.weight')
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match='transformer.wpe.weight is only in one of'):
        GPT.from_pretrained(str(tmp_path))


def test_names_of_old_files(tmp_path):
    """GPT-2's own on the hub: no prefix, the causal masks as weights, and few keys in config.json."""
    theirs = gpt2()
    theirs.save_pretrained(tmp_path)
    weights = {name.removeprefix('transformer.'): tensor for name, tensor in
               load_file(tmp_path / 'model.safetensors').items()}
    for i in range(3):
        weights[f'h.{i}.attn.bias'] = torch.ones(1, 1, 24, 24).tril()
        weights[f'h.{i}.attn.masked_bias'] = torch.tensor(-1e4)
    save_file(weights, tmp_path / 'model.safetensors')
    config = json.loads((tmp_path / 'config.json').read_text())
    few = ('model_type', 'vocab_size', 'n_positions', 'n_embd', 'n_layer', 'n_head', 'activation_function')
    (tmp_path / 'config.json').write_text(json.dumps({key: config[key] for key in few}))
    close(tmp_path, theirs)


def test_rope_as_before_transformers_5(tmp_path):
    theirs = apertus()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / 'config.json'
    config = json.loads(path.read_text())
    del config['rope_parameters']
    path.write_text(json.dumps(config | {'rope_theta': 10000.0, 'rope_scaling': None}))
    close(tmp_path, theirs)
    path.write_text(json.dumps(config | {'rope_theta': 500000.0, 'rope_scaling': None}))
    with pytest.raises(InputError, match='rope_parameters=|rope_theta='):
        GPT.from_pretrained(str(tmp_path))


def q_gain():
    model = apertus()
    model.model.layers[1].self_attn.q_norm.weight.data[3] = 1.5
    return model


@pytest.mark.parametrize('make, message', [
    (lambda: xielu(beta=0.5), 'layers.0.mlp.act_fn is not ReLU squared'),
    (lambda: xielu(alpha_n=0.1), 'is not ReLU squared'),
    (q_gain, 'layers.1.self_attn.q_norm has gains'),
    (lambda: apertus(tie_word_embeddings=True), 'model.norm has gains'),
    (lambda: apertus(rms_norm_eps=1e-5), 'rms_norm_eps=1e-05; only 1e-06'),
    (lambda: apertus(rope_parameters={'rope_type': 'default', 'rope_theta': 5e5}), 'rope_parameters='),
    (lambda: apertus(hidden_act='silu'), "hidden_act='silu'"),
    (lambda: opt(activation_function='relu'), "activation_function='relu'"),
    (lambda: opt(do_layer_norm_before=False), 'do_layer_norm_before=False'),
    (lambda: opt(word_embed_proj_dim=16), 'word_embed_proj_dim=16'),
    (lambda: opt(enable_bias=False), 'enable_bias=False'),
    (lambda: gpt2(layer_norm_epsilon=1e-6), 'layer_norm_epsilon=1e-06'),
])
def test_what_has_no_place_here(tmp_path, make, message):
    make().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        GPT.from_pretrained(str(tmp_path))


def test_weights_that_are_missing_or_left_over(tmp_path):
    gpt2().save_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors'
    weights = load_file(path)
    save_file(weights | {'transformer.h.0.attn.gate': torch.ones(2)}, path)
    with pytest.raises(InputError, match='transformer.h.0.attn.gate is unexpected'):
        GPT.from_pretrained(str(tmp_path))
    save_file({name: tensor for name, tensor in weights.items() if name != 'transformer.h.1.ln_2.bias'}, path)
    with pytest.raises(InputError, match='transformer.h.1.ln_2.bias is missing'):
        GPT.from_pretrained(str(tmp_path))
    save_file(weights | {'transformer.ln_f.bias': torch.ones(2)}, path)
    with pytest.raises(InputError, match=r'ln_f.bias has the shape \(2,\), this model needs \(32,\)'):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('key, value', [('n_layer', '2'), ('n_embd', -32), ('n_head', True), ('n_layer', [1]),
                                        ('activation_function', ['gelu']), ('tie_word_embeddings', 'yes')])
def test_values_that_cannot_be(tmp_path, key, value):
    gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match=f'config.json has {key}='):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('file, content, message', [
    ('config.json', b'{"model_', r'config\.json is damaged'), ('config.json', b'[]', r'config\.json is damaged'),
    ('model.safetensors', b'version https://git-lfs.github.com/spec/v1\noid', 'git lfs pull'),
    ('model.safetensors', b'x' * 99, r'model\.safetensors is damaged'),
    ('model.safetensors.index.json', b'{"weight_map": 5}', 'index.json is damaged'),
    ('model.safetensors.index.json', b'{"weight_map": {}}', 'the weight .* is missing')])
def test_damaged_files_are_named(tmp_path, file, content, message):
    gpt2().save_pretrained(tmp_path)
    if 'index' in file:
        (tmp_path / 'model.safetensors').unlink()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        GPT.from_pretrained(str(tmp_path))


def test_tokenizers_that_are_not_known(tmp_path):
    """The model is read all the same; who needs the tokenizer is told."""
    gpt2().save_pretrained(tmp_path)
    for make, message in (
            (lambda: None, 'has no tokenizer.json'),
            (lambda: (tmp_path / 'tokenizer.json').write_text('{'), 'tokenizer.json cannot be read: it is damaged'),
            (lambda: (tmp_path / 'tokenizer_config.json').write_text('[]'), 'tokenizer_config.json is damaged'),
            (lambda: (tmp_path / 'tokenizer_config.json').write_text('{"sologpt": {"kind": "chars"}}'), 'damaged')):
        make()
        config, _, saved = read_model(str(tmp_path))
        with pytest.raises(InputError, match=f'{message}.*set dataset'):
            data_folder.tokenizer_of_model(saved, '', config['vocab_size'], 'a test')
    opt(vocab_size=50272).save_pretrained(tmp_path / 'opt')  # as large as GPT-2's, and another
    assert read_model(str(tmp_path / 'opt'))[2]['tokenizer']['kind'] == 'unknown'
    gpt2(vocab_size=50257).save_pretrained(tmp_path / 'gpt2')
    assert read_model(str(tmp_path / 'gpt2'))[2] == {}  # GPT-2's, unless data with another are named


def test_from_the_hub(tmp_path, monkeypatch):
    """A repository in several files, with a tokenizer of its own; and GPT-2, whose tokenizer tiktoken has."""
    gpt2().save_pretrained(tmp_path, max_shard_size='20KB')
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({chr(97 + i): i for i in range(37)}, '?'))
    backend.decoder = tokenizers.decoders.Fuse()
    backend.save(str(tmp_path / 'tokenizer.json'))
    asked = []

    def get(repository, file):
        asked.append((repository, file))
        if not (tmp_path / file).exists():
            raise EntryNotFoundError(file)
        return str(tmp_path / file)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', get)
    _, _, saved = read_model('someone/model')
    assert saved['tokenizer']['kind'] == 'json' and ('someone/model', 'tokenizer.json') in asked
    asked.clear()
    GPT.from_pretrained('gpt2-medium')
    assert {repository for repository, _ in asked} == {'openai-community/gpt2-medium'}
    assert 'tokenizer.json' not in {file for _, file in asked}
    asked.clear()

    def offline(repository, file):  # with the weights in the cache, and nothing known of the rest
        if file.startswith('tokenizer'):
            raise LocalEntryNotFoundError(file)
        return get(repository, file)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', offline)
    assert read_model('someone/model')[2]['tokenizer']['kind'] in ('json', 'unknown')


def test_tables_of_positions_are_not_on_the_meta_device(tmp_path):
    apertus().save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    fresh = GPT(GPTConfig(arch='modern', block_size=24, vocab_size=37, n_layer=2, n_head=4, n_embd=32))
    for name, buffer in fresh.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
