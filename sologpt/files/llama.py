"""
The families whose blocks are Llama's: RMSNorms with gains, SwiGLU, rotary positions, grouped queries. They are told
apart by biases, by the norms of queries and keys, and by windows.

What an absent key of config.json means is what the classes of transformers say. A null is not an absent key.
"""

from collections.abc import Callable
from dataclasses import dataclass

from configurator import InputError
from sologpt.files.family import Family, blocks

MODULES = {'transformer.wte': ['model.embed_tokens'],
           **blocks('model.layers', 'input_layernorm', 'self_attn.q_proj self_attn.k_proj self_attn.v_proj',
                    'self_attn.o_proj', 'post_attention_layernorm', 'mlp.gate_proj mlp.up_proj', 'mlp.down_proj'),
           'transformer.ln_f': ['model.norm'], 'lm_head': ['lm_head']}
QK_NORMS = {f'transformer.h.{{}}.attn.{name}': [f'model.layers.{{}}.self_attn.{name}'] for name in ('q_norm', 'k_norm')}
SIZES = {'n_embd': 'hidden_size', 'n_inner': 'intermediate_size', 'n_layer': 'num_hidden_layers',
         'n_head': 'num_attention_heads', 'vocab_size': 'vocab_size', 'block_size': 'max_position_embeddings'}
# keys of rope_scaling that change what is computed
SCALING = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings', 'beta_fast',
           'beta_slow', 'attention_factor', 'mscale', 'mscale_all_dim', 'truncate')
# what `bias` is here -> (attention_bias, mlp_bias)
BIAS_KEYS = {False: (False, False), 'attention': (True, False), 'mlp': (False, True), 'linears': (True, True)}
# keys -> the values by which they change nothing. With others, the model is not one of these
NEUTRAL = {'hidden_act': ('silu', 'swish'), 'partial_rotary_factor': (1.0,), 'quantization_config': (None,),
           'logits_scaling': (1.0,), 'embedding_multiplier': (1.0,), 'residual_multiplier': (1.0,),
           'attention_multiplier': (None,), 'final_logit_softcapping': (None,), 'attn_logit_softcapping': (None,)}


@dataclass(frozen=True)
class Llama(Family):
    """A family with Llama's blocks."""
    read_bias: Callable = lambda given: False  # config.json -> the key bias
    read_window: Callable = lambda given, n_layer: (None, None)  # config.json -> the keys window and windowed
    write_window: Callable = lambda config: {}  # a GPTConfig -> the keys of config.json about windows

    def read_config(self, settings, source):
        given = self.defaults | settings
        for key, values in NEUTRAL.items():
            if key in given and given[key] not in values:
                raise InputError(f'{source}: config.json has {key}={given[key]!r}; only {values[0]!r} can be loaded')
        config = {'arch': 'llama', **self.parts}
        for ours, key in SIZES.items():
            config[ours] = _size(given, key, source)
        config |= {'norm_eps': given['rms_norm_eps'], 'tied': given['tie_word_embeddings'],
                   'bias': self.read_bias(given)}
        config['n_kv_head'] = _size(given, 'num_key_value_heads', source, or_null=config['n_head'])
        if given.get('head_dim') is not None:
            config['head_dim'] = _size(given, 'head_dim', source)
        config['rope_base'], config['rope_scaling'] = _read_rope(given, source)
        config['window'], config['windowed'] = self.read_window(given, config['n_layer'])
        return config

    def write_config(self, config):
        rope = {'rope_type': 'default'} | (config.rope_scaling or {})
        attention_bias, mlp_bias = BIAS_KEYS.get(config.bias, (False, False))
        biases = {'attention_bias': attention_bias, 'mlp_bias': mlp_bias}
        return {key: getattr(config, ours) for ours, key in SIZES.items()} | {
            'num_key_value_heads': config.n_kv_head, 'head_dim': config.head_dim, 'hidden_act': 'silu',
            'rms_norm_eps': config.norm_eps, 'tie_word_embeddings': config.tied, 'attention_dropout': 0.0,
            # as transformers reads it before version 5, and since
            'rope_theta': config.rope_base, 'rope_scaling': config.rope_scaling and rope,
            'rope_parameters': rope | {'rope_theta': config.rope_base},
            **{key: value for key, value in biases.items() if key in self.defaults}, **self.write_window(config)}


def _size(given, key, source, or_null=None):
    value = given.get(key, None)
    if value is None and or_null is not None:
        return or_null
    if type(value) is not int or value < 1:
        raise InputError(f'{source}: config.json has no {key}' if key not in given else
                         f'{source}: config.json has {key}={value!r}, which cannot be')
    return value


def _read_rope(given, source):
    """(the keys rope_base, rope_scaling) of config.json as transformers writes it since version 5, or before."""
    rope = {**(given.get('rope_scaling') or {}), **(given.get('rope_parameters') or {})}
    base = rope.get('rope_theta') or given.get('rope_theta') or 10000.0
    kind = rope.get('rope_type') or rope.get('type') or 'default'
    if kind == 'default':
        return base, None
    if kind not in ('linear', 'dynamic', 'llama3', 'yarn'):
        raise InputError(f'{source}: config.json has rope_type={kind!r}; only default, linear, dynamic, llama3 and '
                         f'yarn can be loaded')
    scaling = {key: rope[key] for key in SCALING if rope.get(key) is not None}
    if kind in ('llama3', 'yarn'):
        scaling.setdefault('original_max_position_embeddings', given['max_position_embeddings'])
    return base, {'rope_type': kind} | scaling


# ---- how the families differ -----------------------------------------------------------------------------------------

def _bias_by_keys(given):
    found = bool(given.get('attention_bias')), bool(given.get('mlp_bias'))
    return next(bias for bias, keys in BIAS_KEYS.items() if keys == found)


def _window_everywhere(given, n_layer):
    return given['sliding_window'], None


def _window_of_some(given, n_layer):
    if not given['use_sliding_window'] or given['sliding_window'] is None:
        return None, None
    types = given.get('layer_types') or ['sliding_attention' if i >= given['max_window_layers'] else 'full_attention'
                                         for i in range(n_layer)]
    windowed = [i for i, kind in enumerate(types) if kind == 'sliding_attention']
    return (given['sliding_window'], windowed) if windowed else (None, None)


def _write_window_of_some(config):
    windowed = [i for i in range(config.n_layer) if config.window_of(i)]
    types = ['sliding_attention' if i in windowed else 'full_attention' for i in range(config.n_layer)]
    return {'use_sliding_window': bool(windowed), 'sliding_window': config.window, 'layer_types': types,
            'max_window_layers': windowed[0] if windowed else config.n_layer}


PARTS = {'norm': 'rmsnorm_gain', 'positions': 'rotary', 'qk_norm': False, 'activation': 'swiglu', 'zero_init': False,
         'embd_norm': False, 'smear': False}
DEFAULTS = {'rms_norm_eps': 1e-6, 'tie_word_embeddings': False, 'num_key_value_heads': None}
QWEN = DEFAULTS | {'num_key_value_heads': 32, 'use_sliding_window': False, 'sliding_window': 4096,
                   'max_window_layers': 28}


def _row(cls, modules=MODULES, parts=PARTS, **options):
    return Llama(cls=cls, arch='llama', parts=parts, keys=SIZES, modules=modules, constants=lambda *_: {}, dropouts=(),
                 bias=None, **options)


LLAMAS = {
    'llama': _row('LlamaForCausalLM', defaults=DEFAULTS | {'attention_bias': False, 'mlp_bias': False},
                  read_bias=_bias_by_keys),
    'mistral': _row('MistralForCausalLM', defaults=DEFAULTS | {'num_key_value_heads': 8, 'sliding_window': 4096},
                    read_window=_window_everywhere, write_window=lambda config: {'sliding_window': config.window}),
    'qwen2': _row('Qwen2ForCausalLM', defaults=QWEN, read_bias=lambda given: 'qkv',
                  read_window=_window_of_some, write_window=_write_window_of_some),
    'qwen3': _row('Qwen3ForCausalLM', modules=MODULES | QK_NORMS, parts=PARTS | {'qk_norm': 'gain'},
                  defaults=QWEN | {'head_dim': 128, 'attention_bias': False}, read_bias=_bias_by_keys,
                  read_window=_window_of_some, write_window=_write_window_of_some),
}


def find_llama(config) -> str:
    """The family that a GPTConfig with arch='llama' is written as."""
    if config.qk_norm == 'gain':
        return 'qwen3'
    if config.bias == 'qkv':
        return 'qwen2'
    return 'mistral' if config.window else 'llama'
