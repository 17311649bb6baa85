"""
The families of models that are read and written: see family.py.

    gpt2                           GPT2LMHeadModel     arch='gpt2'
    opt                            OPTForCausalLM      arch='gpt2' too: inference servers serve LoRA adapters of OPT,
                                                       but not of GPT-2
    apertus                        ApertusForCausalLM  arch='modern'
    llama, mistral, qwen2, qwen3   LlamaForCausalLM... arch='llama'

Each is a row of FAMILIES. Reading, writing and the renaming of adapters follow from the row.
"""

import torch.nn.functional as F

from configurator import InputError
from sologpt.files.family import Family, blocks, take
from sologpt.files.llama import LLAMAS, find_llama
from sologpt.matmuls.elementwise import RMS_EPS


class Apertus(Family):
    """
    Apertus's norms have gains, which become part of the next Linear. Its activation is xIELU
    (https://arxiv.org/abs/2411.13010):

        a x^2 + b x                   above 0, with a = softplus(alpha_p)
        c (exp(x) - 1 - x) + b x      below 0, with c = b + softplus(alpha_n)

    With b = 0 and c = 4e-18 it is a times ReLU squared. No 16-bit alpha_p has the softplus 1, but that of 16 is 16, to
    7e-9. So a is 16, and the activation's input is divided by 4, which is exact.
    """

    def factor(self, linear, config):
        return 0.25 if linear.endswith('mlp.c_fc') and config.activation == 'relu2' else 1.0

    def extras(self, config):
        xielu = {'alpha_p': [16.0], 'alpha_n': [-40.0], 'beta': 0.0, 'eps': -1e-6}
        for i in range(config.n_layer):
            for name in ('q_norm', 'k_norm'):
                yield f'model.layers.{i}.self_attn.{name}.weight', [1.0] * (config.n_embd // config.n_head)
            for name, value in xielu.items() if config.activation == 'relu2' else ():
                yield f'model.layers.{i}.mlp.act_fn.{name}', value

    def absorb(self, config, theirs, own, source):
        for i in range(config['n_layer']):
            there, here = f'model.layers.{i}', f'transformer.h.{i}'
            for name in ('q_norm', 'k_norm'):
                if (take(theirs, f'{there}.self_attn.{name}.weight', source) != 1).any():
                    raise InputError(f'{source}: {there}.self_attn.{name} has gains other than 1, and this project has '
                                     f'no place for them')
            _scale(own, f'{here}.attn.c_attn.weight', own.pop(f'{here}.ln_1.weight'))
            _scale(own, f'{here}.mlp.c_fc.weight', own.pop(f'{here}.ln_2.weight'))
            if config['activation'] == 'xielu':
                alpha_p, alpha_n, beta, _ = (take(theirs, f'{there}.mlp.act_fn.{name}', source)
                                             for name in ('alpha_p', 'alpha_n', 'beta', 'eps'))
                if beta != 0 or F.softplus(alpha_n.float()) > 1e-6:
                    raise InputError(f'{source}: {there}.mlp.act_fn is not ReLU squared: only beta=0 and an alpha_n '
                                     f'below -14 can be loaded')
                _scale(own, f'{here}.mlp.c_fc.weight', F.softplus(alpha_p.float()).sqrt())  # a x^2 = (sqrt(a) x)^2
        gain = own.pop('transformer.ln_f.weight')
        if config['tied'] and (gain != 1).any():
            raise InputError(f'{source}: model.norm has gains other than 1, and there is no place for them if the head '
                             f'is the embedding table')
        _scale(own, 'lm_head.weight', gain)


def _scale(own, linear, factor):
    if (factor != 1).any():
        own[linear] = own[linear].float() * factor.float()


FAMILIES = {
    'gpt2': Family(
        cls='GPT2LMHeadModel', arch='gpt2', transposed=True,
        parts={'norm': 'layernorm', 'positions': 'learned', 'qk_norm': False, 'embd_norm': False, 'smear': False},
        keys={'block_size': 'n_positions', 'vocab_size': 'vocab_size', 'n_layer': 'n_layer', 'n_head': 'n_head',
              'n_embd': 'n_embd', 'activation': 'activation_function', 'tied': 'tie_word_embeddings'},
        modules={'transformer.wte': ['transformer.wte'], 'transformer.wpe': ['transformer.wpe'],
                 **blocks('transformer.h', 'ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj'),
                 'transformer.ln_f': ['transformer.ln_f'], 'lm_head': ['lm_head']},
        constants=lambda n_embd, n_head: {
            'n_inner': 4 * n_embd, 'layer_norm_epsilon': 1e-5, 'scale_attn_weights': True,
            'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False},
        defaults={'activation_function': 'gelu_new', 'tie_word_embeddings': True},
        dropouts=('embd_pdrop', 'attn_pdrop', 'resid_pdrop')),
    'opt': Family(
        cls='OPTForCausalLM', arch='gpt2', first_position=2,
        parts={'norm': 'layernorm', 'positions': 'learned', 'qk_norm': False, 'embd_norm': False, 'smear': False},
        keys={'block_size': 'max_position_embeddings', 'vocab_size': 'vocab_size', 'n_layer': 'num_hidden_layers',
              'n_head': 'num_attention_heads', 'n_embd': 'hidden_size', 'activation': 'activation_function',
              'tied': 'tie_word_embeddings'},
        modules={'transformer.wte': ['model.decoder.embed_tokens'],
                 'transformer.wpe': ['model.decoder.embed_positions'],
                 **blocks('model.decoder.layers', 'self_attn_layer_norm',
                           'self_attn.q_proj self_attn.k_proj self_attn.v_proj', 'self_attn.out_proj',
                           'final_layer_norm', 'fc1', 'fc2'),
                 'transformer.ln_f': ['model.decoder.final_layer_norm'], 'lm_head': ['lm_head']},
        constants=lambda n_embd, n_head: {
            'ffn_dim': 4 * n_embd, 'word_embed_proj_dim': n_embd, 'do_layer_norm_before': True,
            '_remove_final_layer_norm': False, 'enable_bias': True, 'layer_norm_elementwise_affine': True},
        defaults={'activation_function': 'relu', 'tie_word_embeddings': True, 'ffn_dim': 3072},
        dropouts=('dropout', 'attention_dropout')),
    'apertus': Apertus(
        cls='ApertusForCausalLM', arch='modern', bias=False,
        parts={'norm': 'rmsnorm', 'positions': 'rotary', 'qk_norm': True, 'bias': False, 'smear': False},
        keys={'block_size': 'max_position_embeddings', 'vocab_size': 'vocab_size', 'n_layer': 'num_hidden_layers',
              'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads', 'n_embd': 'hidden_size',
              'n_inner': 'intermediate_size', 'activation': 'hidden_act', 'tied': 'tie_word_embeddings'},
        modules={'transformer.wte': ['model.embed_tokens'],
                 **blocks('model.layers', 'attention_layernorm', 'self_attn.q_proj self_attn.k_proj self_attn.v_proj',
                           'self_attn.o_proj', 'feedforward_layernorm', 'mlp.up_proj', 'mlp.down_proj'),
                 'transformer.ln_f': ['model.norm'], 'lm_head': ['lm_head']},
        constants=lambda n_embd, n_head: {
            'rms_norm_eps': RMS_EPS, 'attention_bias': False, 'rope_theta': 10000.0,
            'rope_scaling': None,  # as transformers before 5 reads it
            'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0}},
        defaults={'hidden_act': 'xielu', 'tie_word_embeddings': False, 'intermediate_size': 14336,
                  'rms_norm_eps': 1e-5, 'rope_parameters': 'llama3'},
        dropouts=('attention_dropout',), activations={'relu2': 'xielu'}),
    **LLAMAS,
}


def find_family(config, to: str) -> str:
    """The name of the family that a GPTConfig is written as. to: 'hf' or 'opt'. Raises InputError if there is none."""
    name = 'opt' if to == 'opt' else find_llama(config) if config.arch == 'llama' else \
        'apertus' if config.positions == 'rotary' else 'gpt2'
    family = FAMILIES[name]
    usual = {'n_kv_head': config.n_head, 'head_dim': config.n_embd // config.n_head, 'n_inner': 4 * config.n_embd,
             'rope_base': 10000.0, 'rope_scaling': None, 'window': None} if family.arch != 'llama' else {}
    for key, value in ({key: value for key, value in usual.items() if key not in family.keys} | family.parts).items():
        if getattr(config, key) != value:
            other = f'--{key}={value}' if config.arch == family.arch else f'--arch={family.arch}'
            raise InputError(f"the model has {key}={getattr(config, key)!r}, and transformers' {family.cls} only "
                             f'{value!r}: train with {other}, or use --to=onnx, --to=torch'
                             f'{" or --to=hf" * (to == "opt")}')
    return name
