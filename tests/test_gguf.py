"""GGUF files, read back by the package gguf and by transformers, and tokenized as llama.cpp does it."""

import json
import sys
import weakref
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from configurator import InputError
from model import GPTConfig
from sologpt.exports import gguf as exports
from sologpt.exports.gguf_tokenizer import LLAMA3, QWEN2, SPACE, TokenizerFiles, known_differences, tokenizer_keys
from sologpt.files.families import FAMILIES
from sologpt.files.hf_models import read_hf_model

gguf = pytest.importorskip('gguf')

ROWS = 320
TEXT = 'def to_gguf(tensors: Pairs, settings: dict) -> Pairs:\n    """The tensors by the names of GGUF."""\n' * 3
BASE = dict(vocab_size=ROWS, hidden_size=96, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.2,
            bos_token_id=0, eos_token_id=0, pad_token_id=None)
ENDS = {'model.embed_tokens.weight': 'token_embd.weight', 'model.norm.weight': 'output_norm.weight',
        'lm_head.weight': 'output.weight'}
INSIDE = {'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm', 'self_attn.q_proj': 'attn_q',
          'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output',
          'self_attn.q_norm': 'attn_q_norm', 'self_attn.k_norm': 'attn_k_norm', 'mlp.gate_proj': 'ffn_gate',
          'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down'}


def rope(kind, theta, **more):
    return {'rope_parameters': {'rope_type': kind, 'rope_theta': theta, **more}}


YARN = rope('yarn', 1e6, factor=4.0, original_max_position_embeddings=16)
THREE = rope('llama3', 5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
MODELS = {
    'llama': ('llama', {}),
    'biases': ('llama', dict(head_dim=32, attention_bias=True, mlp_bias=True)),
    'llama3': ('llama', dict(tie_word_embeddings=True, max_position_embeddings=128, **THREE)),
    'linear': ('llama', rope('linear', 1e4, factor=4.0)),
    'mistral': ('mistral', dict(sliding_window=None, head_dim=32)),
    'qwen2': ('qwen2', dict(tie_word_embeddings=True, num_key_value_heads=1, sliding_window=8)),
    'qwen3': ('qwen3', dict(tie_word_embeddings=True, head_dim=128)),
    'yarn': ('qwen3', dict(head_dim=32, **YARN)),
}


def tiny(kind, changes):
    """A model of transformers with random weights, and the content of its config.json."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**BASE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model, json.loads(config.to_json_string(use_diff=False))


@pytest.fixture(scope='module')
def byte_level():
    """The content of a tokenizer.json with a byte-level BPE of 300 ids that splits as GPT-2's."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trained.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=['<|endoftext|>', '<|im_end|>'], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    trained.add_tokens(['<think>'])
    return json.loads(trained.to_str())


@pytest.fixture(scope='module')
def sentencepiece():
    """The same as Llama 2 has it: 259 special tokens and bytes, then tokens of which any two neighbours are joined."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.train_from_iterator([SPACE + TEXT.replace(' ', SPACE)], tokenizers.trainers.BpeTrainer(
        vocab_size=90, show_progress=False))
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    tokens = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), *learned]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [[token[:i], token[i:]] for token in tokens for i in range(1, len(token))
              if token[:i] in vocab and token[i:] in vocab]
    added = [{'id': i, 'content': token, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
              'special': True} for i, token in enumerate(tokens[:3])]
    begin = {'SpecialToken': {'id': '<s>', 'type_id': 0}}
    return {
        'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added,
        'normalizer': {'type': 'Sequence', 'normalizers': [
            {'type': 'Prepend', 'prepend': SPACE},
            {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}]},
        'pre_tokenizer': None, 'decoder': {'type': 'ByteFallback'},
        'post_processor': {'type': 'TemplateProcessing', 'single': [begin, {'Sequence': {'id': 'A', 'type_id': 0}}],
                           'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 0}}],
                           'special_tokens': {'<s>': {'id': '<s>', 'ids': [1], 'tokens': ['<s>']}}},
        'model': {'type': 'BPE', 'dropout': None, 'unk_token': '<unk>', 'continuing_subword_prefix': None,
                  'end_of_word_suffix': None, 'fuse_unk': True, 'byte_fallback': True, 'vocab': vocab,
                  'merges': merges}}


def write(path, model, settings, tokenizer, dtype='float32'):
    return write_with(path, model, settings, TokenizerFiles(tokenizer, {}, [0, 1]), dtype)


def write_with(path, model, settings, text, dtype):
    model.save_pretrained(path.parent / 'hf')
    config, weights, family, _ = read_hf_model(str(path.parent / 'hf'))
    return exports.write_gguf_file(str(path), GPTConfig(**config), family, weights, text, 'tiny', dtype)


def config_of(settings):
    return GPTConfig(**FAMILIES[settings['model_type']].read_config(settings, 'x'))


def read(path):
    """(key -> value, name -> tensor of the reader) of a GGUF file."""
    reader = gguf.GGUFReader(str(path))
    return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def their_name(name):
    _, _, block, *inside, end = name.split('.') if name.startswith('model.layers.') else ['', '', '', name, '']
    return f'blk.{block}.{INSIDE[".".join(inside)]}.{end}' if block else ENDS[name]


def paired(tensor, heads):
    """Row 2i of each head is row i of Hugging Face's, and row 2i + 1 is i + head_dim / 2."""
    width = len(tensor) // heads
    order = [head * width + half * width // 2 + i for head in range(heads) for i in range(width // 2)
             for half in (0, 1)]
    return tensor[order]


@pytest.mark.parametrize('case', MODELS)
def test_all_tensors_and_keys_are_what_llama_cpp_reads(case, byte_level, tmp_path):
    kind, changes = MODELS[case]
    model, settings = tiny(kind, changes)
    write(tmp_path / 'x.gguf', model, settings, byte_level)
    keys, tensors = read(tmp_path / 'x.gguf')
    weights = {name: tensor for name, tensor in model.state_dict().items()
               if not (name == 'lm_head.weight' and settings['tie_word_embeddings'])}
    arch = 'llama' if kind in ('llama', 'mistral') else kind
    expected = {their_name(name): paired(t, settings['num_attention_heads' if 'q_proj' in name
                                                     else 'num_key_value_heads'])
                if arch == 'llama' and ('q_proj' in name or 'k_proj' in name) else t for name, t in weights.items()}
    if case == 'llama3':
        plain = 5e5 ** -(torch.arange(0, 16, 2) / 16)
        scaled = model.model.rotary_emb.inv_freq
        torch.testing.assert_close(torch.tensor(tensors.pop('rope_freqs.weight').data), plain / scaled)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(tensors[name].data, tensor.numpy()), name

    head_dim = settings.get('head_dim') or 16
    assert keys['general.architecture'] == arch and keys['general.name'] == 'tiny' and keys['general.file_type'] == 0
    scaling = {key.removeprefix(f'{arch}.rope.scaling.'): value for key, value in keys.items() if '.scaling.' in key}
    assert scaling == {'linear': {'type': 'linear', 'factor': 4}, 'yarn': {
        'type': 'yarn', 'factor': 4, 'original_context_length': 16}}.get(case, {})
    own = {key.removeprefix(f'{arch}.'): value for key, value in keys.items()
           if key.startswith(arch) and '.scaling.' not in key}
    assert own == {
        'block_count': 2, 'context_length': settings['max_position_embeddings'], 'embedding_length': 96,
        'feed_forward_length': 80, 'vocab_size': ROWS, 'attention.head_count': 6,
        'attention.head_count_kv': settings['num_key_value_heads'], 'attention.key_length': head_dim,
        'attention.value_length': head_dim, 'rope.dimension_count': head_dim,
        'attention.layer_norm_rms_epsilon': np.float32(1e-5),
        'rope.freq_base': np.float32(settings['rope_parameters']['rope_theta'])}


@pytest.mark.parametrize('case', ['llama', 'mistral', 'qwen2', 'qwen3'])
def test_transformers_reads_the_same_model_from_float16(case, byte_level, tmp_path):
    model, settings = tiny(*MODELS[case])
    write(tmp_path / 'x.gguf', model, settings, byte_level, 'float16')
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file='x.gguf', dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half() if p.dim() > 1 else p)
        ids = torch.arange(40)[None]
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-3)


def test_the_formats_hold_the_rounded_numbers(byte_level, tmp_path):
    model, settings = tiny('qwen2', {})
    up, down = (model.model.layers[0].mlp.__getattr__(f'{name}_proj').weight.detach() for name in ('up', 'down'))
    for dtype in ('float16', 'bfloat16', 'q8_0'):
        said = write(tmp_path / dtype, model, settings, byte_level, dtype)
        keys, tensors = read(tmp_path / dtype)
        assert {name: t.data for name, t in tensors.items() if 'norm' in name or 'bias' in name}.keys() == {
            name for name, t in tensors.items() if t.tensor_type == gguf.GGMLQuantizationType.F32}
        numbers = torch.tensor(gguf.dequantize(tensors['blk.0.ffn_up.weight'].data,
                                               tensors['blk.0.ffn_up.weight'].tensor_type))
        if dtype == 'q8_0':
            assert 'matrices are float16' in said and 'blk.0.ffn_down.weight' in said  # rows of 80
            assert tensors['blk.0.ffn_down.weight'].tensor_type == gguf.GGMLQuantizationType.F16
            assert np.array_equal(tensors['blk.0.ffn_down.weight'].data, down.half().numpy())
            scale = up.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
            assert ((numbers - up).reshape(-1, 32).abs() <= 0.51 * scale + 1e-4).all()
            assert keys['general.file_type'] == 7 and keys['general.quantization_version'] == 2
        else:
            assert torch.equal(numbers, up.to(getattr(torch, dtype)).float())


def test_one_converted_tensor_exists_at_a_time(byte_level, tmp_path, monkeypatch):
    model, settings = tiny('llama', {})
    alive, to_gguf = weakref.WeakSet(), exports.to_gguf

    def watched(*args):
        for name, tensor in to_gguf(*args):
            copy = tensor + 0
            alive.add(copy)
            assert len(alive) <= 2  # this one, and the last one, which the loop still names
            yield name, copy
    monkeypatch.setattr(exports, 'to_gguf', watched)
    write(tmp_path / 'x', model, settings, byte_level, 'q8_0')
    assert (tmp_path / 'x').exists()


# ---- tokenizers ------------------------------------------------------------------------------------------------------

def keys_of(tokenizer, settings=None, ends=(), rows=ROWS):
    keys = tokenizer_keys(TokenizerFiles(tokenizer, settings or {}, list(ends)), rows)
    return {key.removeprefix('tokenizer.ggml.'): value for key, value in keys.items()}


def test_a_byte_level_bpe_keeps_tokens_merges_types_and_ids(byte_level, tmp_path):
    model, settings = tiny('llama', {})
    text = TokenizerFiles(byte_level, {'bos_token': None, 'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>'},
                          [1, 0], chat_template='{{ messages }}', bos=0)
    write_with(tmp_path / 'x', model, settings, text, 'float16')
    keys, _ = read(tmp_path / 'x')
    own = {key.removeprefix('tokenizer.ggml.'): value for key, value in keys.items()}
    vocab = sorted(byte_level['model']['vocab'], key=byte_level['model']['vocab'].get)
    assert own['tokens'] == [*vocab, '<think>', *(f'[PAD{i}]' for i in range(301, ROWS))]
    assert own['token_type'] == [3, 3, *[1] * 298, 4, *[5] * 19]
    assert own['merges'] == [' '.join(merge) for merge in byte_level['model']['merges']]
    assert own['model'] == 'gpt2' and own['pre'] == 'gpt-2' and own['add_bos_token'] is False
    assert [own[f'{name}_token_id'] for name in ('eos', 'eot', 'padding', 'bos')] == [1, 0, 0, 0]
    assert own['tokenizer.chat_template'] == '{{ messages }}'
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file='x')
    assert again(TEXT + '<think>x<|im_end|>').input_ids == tokenizers.Tokenizer.from_str(
        json.dumps(byte_level)).encode(TEXT + '<think>x<|im_end|>').ids


@pytest.mark.parametrize('steps, ignore_merges, pre', [
    ([{'type': 'Digits', 'individual_digits': True}, {'use_regex': True}], False, 'smollm'),
    ([{'type': 'Split', 'pattern': {'Regex': LLAMA3}, 'behavior': 'Isolated', 'invert': False}], True, 'llama-bpe'),
    ([{'type': 'Split', 'pattern': {'Regex': QWEN2}, 'behavior': 'Isolated', 'invert': False}], False, 'qwen2'),
])
def test_the_rule_for_words_is_found_from_the_expression(steps, ignore_merges, pre, byte_level):
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
    steps = [*(step for step in steps if 'type' in step), level | (steps[-1] if 'type' not in steps[-1] else {})]
    model = byte_level['model'] | {'ignore_merges': ignore_merges}
    tokenizer = byte_level | {'model': model, 'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': steps}}
    assert keys_of(tokenizer)['pre'] == pre
    with pytest.raises(InputError, match='ignore_merges'):
        keys_of(tokenizer | {'model': model | {'ignore_merges': not ignore_merges}})


def test_a_post_processor_that_begins_texts_sets_add_bos(byte_level):
    template = {'type': 'TemplateProcessing', 'single': [{'SpecialToken': {'id': '<|im_end|>', 'type_id': 0}},
                                                         {'Sequence': {'id': 'A', 'type_id': 0}}]}
    bytes_first = {'type': 'Sequence', 'processors': [{'type': 'ByteLevel'}, template]}
    keys = keys_of(byte_level | {'post_processor': bytes_first}, {'bos_token': '<|endoftext|>'})
    assert keys['add_bos_token'] is True and keys['bos_token_id'] == 1 and keys['add_eos_token'] is False
    assert keys_of(byte_level | {'post_processor': None}, {'add_bos_token': True, 'bos_token': {
        'content': '<|im_end|>'}})['add_bos_token'] is True


def test_a_tokenizer_of_bytes_has_a_merge_that_never_applies(byte_level):
    model = byte_level['model']
    merges = keys_of(byte_level | {'model': model | {'merges': []}})['merges']
    assert len(merges) == 1 and not set(merges[0].split(' ')) & model['vocab'].keys()


def spm_encode(text, keys):
    """llama.cpp's tokenizer 'llama': join the neighbours whose token has the highest score, the left ones first."""
    ids, scores = {token: i for i, token in enumerate(keys['tokens'])}, keys['scores']
    symbols = list((' ' * keys['add_space_prefix'] + text).replace(' ', SPACE))
    while True:
        joined = [(scores[ids[left + right]], -i) for i, (left, right) in enumerate(pairwise(symbols))
                  if left + right in ids]
        if not joined:
            break
        i = -max(joined)[1]
        symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
    found = [[ids[symbol]] if symbol in ids else [ids[f'<0x{byte:02X}>'] for byte in symbol.encode()]
             for symbol in symbols]
    return [keys['bos_token_id']] * keys['add_bos_token'] + sum(found, [])


def test_a_bpe_of_sentencepiece_has_scores_that_join_the_same_tokens(sentencepiece):
    keys = keys_of(sentencepiece, {'eos_token': '</s>'}, rows=384)
    n = len(sentencepiece['model']['vocab'])
    assert keys['model'] == 'llama' and keys['tokens'][n:] == [f'[PAD{i}]' for i in range(n, 384)]
    assert keys['token_type'] == [2, 3, 3, *[6] * 256, *[1] * (n - 259), *[5] * (384 - n)]
    assert [keys[f'{name}_token_id'] for name in ('unknown', 'bos', 'eos')] == [0, 1, 2]
    assert keys['add_bos_token'] is True and keys['add_space_prefix'] is True and 'merges' not in keys
    reference = tokenizers.Tokenizer.from_str(json.dumps(sentencepiece))
    for text in ('the tensors', ' to_gguf(tensors)', '"""The  names', 'Zürich → 日本 settings: dict', TEXT):
        assert spm_encode(text, keys) == reference.encode(text).ids
    assert sum(score < 0 for score in keys['scores']) > 20

    metaspace = sentencepiece | {'normalizer': None, 'pre_tokenizer': {
        'type': 'Metaspace', 'replacement': SPACE, 'prepend_scheme': 'never', 'split': False}}
    assert keys_of(metaspace, rows=384)['add_space_prefix'] is False
    first = metaspace | {'pre_tokenizer': metaspace['pre_tokenizer'] | {'prepend_scheme': 'first'}}
    differences = [known_differences(TokenizerFiles(one, {}, [])) for one in (sentencepiece, metaspace, first)]
    assert list(map(len, differences)) == [0, 0, 1]


# ---- refusals --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, changes, why', [
    ('mistral', {'sliding_window': 8}, 'sliding_window=8'),
    ('qwen2', {'sliding_window': 8, 'use_sliding_window': True, 'max_window_layers': 1, 'layer_types': None},
     'sliding_window=8'),
    ('qwen3', {'sliding_window': 8, 'use_sliding_window': True, 'layer_types': ['full_attention', 'sliding_attention']},
     'sliding_window=8'),
    ('qwen3', {'attention_bias': True}, 'attention_bias'),
    ('llama', {'rope_parameters': None, 'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "rope_scaling.*'dynamic'"),
    ('llama', {'rope_parameters': {**YARN['rope_parameters'], 'beta_fast': 16}}, 'beta_fast=16'),
])
def test_what_llama_cpp_does_not_compute_is_refused(kind, changes, why):
    with pytest.raises(InputError, match=why):
        exports.model_keys(config_of({**BASE, 'model_type': kind, **changes}), kind)


@pytest.mark.parametrize('changes', [
    {'model_type': 'mistral', 'sliding_window': 64}, {'model_type': 'mistral', 'sliding_window': None},
    {'model_type': 'qwen2', 'sliding_window': 8, 'use_sliding_window': False},
    {'model_type': 'qwen2', 'sliding_window': 8, 'use_sliding_window': True, 'max_window_layers': 2},
    {'model_type': 'qwen3', 'sliding_window': 8, 'use_sliding_window': True, 'layer_types': ['full_attention'] * 2},
])
def test_windows_that_change_nothing_are_not_refused(changes):
    exports.model_keys(config_of({**BASE, **changes}), changes['model_type'])


def test_other_families_are_refused():
    with pytest.raises(InputError, match='family gpt2'):
        exports.model_keys(GPTConfig(), 'gpt2')


@pytest.mark.parametrize('changes, why', [
    ({'model': {'type': 'Unigram'}}, 'Unigram'),
    ({'normalizer': {'type': 'Lowercase'}}, 'Lowercase'),
    ({'pre_tokenizer': {'type': 'Whitespace'}}, 'Whitespace'),
    ({'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': False}}, 'no rule'),
    ({'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [
        {'type': 'Split', 'pattern': {'Regex': 'x+'}, 'behavior': 'Isolated', 'invert': False},
        {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': False}]}}, r'by x\+, which'),
])
def test_a_byte_level_tokenizer_of_another_kind_is_refused(changes, why, byte_level):
    with pytest.raises(InputError, match=why):
        keys_of(byte_level | changes)


def test_a_sentencepiece_tokenizer_of_another_kind_is_refused(sentencepiece, byte_level):
    model = sentencepiece['model']
    merges = model['merges']
    again = next(i for i in range(1, len(merges)) if ''.join(merges[i]) == ''.join(merges[i - 1]))
    apart = merges[:again] + merges[again + 1:] + [merges[again]]
    for changes, why in (({'model': model | {'merges': merges[1:]}}, 'merges'),
                         ({'model': model | {'merges': apart}}, 'merges'),
                         ({'model': model | {'vocab': {t: i for t, i in model['vocab'].items() if t != '<0x41>'}}},
                          'byte_fallback'),
                         ({'normalizer': None}, 'spaces')):
        with pytest.raises(InputError, match=why):
            keys_of(sentencepiece | changes, rows=384)
    with pytest.raises(InputError, match='vocab_size=300'):
        keys_of(byte_level, rows=300)


def test_a_wrong_dtype_and_an_absent_package_are_one_line(byte_level, tmp_path, monkeypatch):
    model, settings = tiny('llama', {})
    with pytest.raises(InputError, match='q8_0'):
        write(tmp_path / 'x', model, settings, byte_level, 'int4')
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    with pytest.raises(InputError, match='output.weight has numbers beyond 65504'):
        write(tmp_path / 'x', model, settings, byte_level, 'float16')
    monkeypatch.setitem(sys.modules, 'gguf', None)
    with pytest.raises(InputError, match='pip install gguf'):
        write(tmp_path / 'x', model, settings, byte_level)
