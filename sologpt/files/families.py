"""
Models in Hugging Face's files, reading and writing: which architecture of transformers a model is, what its weights are
called there, and how they are laid out. This is about names and tensors only. It builds no model and does not need
transformers.

    gpt2     GPT2LMHeadModel     arch='gpt2'
    opt      OPTForCausalLM      arch='gpt2' too: inference servers serve LoRA adapters of OPT, but not of GPT-2
    apertus  ApertusForCausalLM  arch='modern'

Each family is a row of FAMILIES. Reading, writing and the renaming of adapters follow from the row.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from configurator import InputError
from sologpt.files.safetensors_files import read_hf_folder, write_tensors
from sologpt.matmuls.elementwise import RMS_EPS

EMBEDDINGS = ('transformer.wte', 'transformer.wpe', 'lm_head')  # have no biases
LINEARS = ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')  # of a block
ACTIVATIONS = {'gelu': 'gelu', 'gelu_python': 'gelu', 'gelu_new': 'gelu_new', 'gelu_pytorch_tanh': 'gelu_new',
               'relu2': 'relu2', 'xielu': 'relu2'}  # theirs -> ours

Tensor = torch.Tensor
Tensors = dict[str, Tensor]  # by name


@dataclass(frozen=True)
class Family:
    """
    One architecture of transformers, as far as it is one of this project's. "Theirs" are its names and tensors, "ours"
    are GPT's. In names of modules, {} stands for the number of a block.
    """
    cls: str  # the class in transformers
    arch: str  # ours
    parts: dict  # key of GPTConfig -> the only value that the architecture has a place for
    keys: dict  # key of GPTConfig -> key of config.json
    modules: dict  # our module -> their modules: several if they are parts of ours, stacked along the rows
    constants: Callable  # (n_embd, n_head) -> more of config.json, which has to be so
    defaults: dict  # key of config.json -> what an absent key means, unless that is what `constants` says
    dropouts: tuple  # keys of config.json that are dropout probabilities
    bias: bool = True  # Linears and norms have biases
    transposed: bool = False  # the weights of the blocks' Linears are (in, out)
    first_position: int = 0  # the row of the table of positions that the first token takes
    activations: dict = field(default_factory=dict)  # our name -> their name, if they differ

    def names(self, n_layer: int, tied: bool) -> Iterator[tuple[str, list[str]]]:
        """Yields (our module, its names there) for all modules that have weights."""
        for ours, theirs in self.modules.items():
            if ours != 'lm_head' or not tied:
                for i in range(n_layer) if '{}' in ours else [0]:
                    yield ours.format(i), [name.format(i) for name in theirs]

    def linears(self, name: str) -> list[str]:
        """Their names of the Linear `name` of a block, such as transformer.h.0.mlp.c_fc."""
        _, _, i, part = name.split('.', 3)
        return [theirs.format(i) for theirs in self.modules[f'transformer.h.{{}}.{part}']]

    def factor(self, linear: str, config) -> float:
        """What the weights of a Linear are multiplied by when they become theirs."""
        return 1.0

    def extras(self, config) -> Iterator[tuple[str, list | float]]:
        """Yields (name, value) of the tensors that they have beyond the weights of modules."""
        return iter(())

    def absorb(self, config: dict, theirs: Tensors, own: Tensors, source: str) -> None:
        """
        Make what only their architecture has part of our weights, `own`, and take it out of `theirs`.

        config: keys of GPTConfig, but with their name of the activation. Raises InputError if it cannot be.
        """


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
                if (_take(theirs, f'{there}.self_attn.{name}.weight', source) != 1).any():
                    raise InputError(f'{source}: {there}.self_attn.{name} has gains other than 1, and this project has '
                                     f'no place for them')
            _scale(own, f'{here}.attn.c_attn.weight', own.pop(f'{here}.ln_1.weight'))
            _scale(own, f'{here}.mlp.c_fc.weight', own.pop(f'{here}.ln_2.weight'))
            if config['activation'] == 'xielu':
                alpha_p, alpha_n, beta, _ = (_take(theirs, f'{there}.mlp.act_fn.{name}', source)
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


def _take(theirs, name, source):
    if name not in theirs:
        raise InputError(f'{source}: the weight {name} is missing from the file')
    return theirs.pop(name)


def _blocks(prefix, ln_1, c_attn, c_proj, ln_2, c_fc, mlp_c_proj):
    theirs = (('ln_1', ln_1), ('attn.c_attn', c_attn), ('attn.c_proj', c_proj), ('ln_2', ln_2), ('mlp.c_fc', c_fc),
              ('mlp.c_proj', mlp_c_proj))
    return {f'transformer.h.{{}}.{ours}': [f'{prefix}.{{}}.{name}' for name in names.split()] for ours, names in theirs}


FAMILIES = {
    'gpt2': Family(
        cls='GPT2LMHeadModel', arch='gpt2', transposed=True,
        parts={'norm': 'layernorm', 'positions': 'learned', 'qk_norm': False, 'embd_norm': False, 'smear': False},
        keys={'block_size': 'n_positions', 'vocab_size': 'vocab_size', 'n_layer': 'n_layer', 'n_head': 'n_head',
              'n_embd': 'n_embd', 'activation': 'activation_function', 'tied': 'tie_word_embeddings'},
        modules={'transformer.wte': ['transformer.wte'], 'transformer.wpe': ['transformer.wpe'],
                 **_blocks('transformer.h', 'ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj'),
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
                 **_blocks('model.decoder.layers', 'self_attn_layer_norm',
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
              'n_head': 'num_attention_heads', 'n_embd': 'hidden_size', 'activation': 'hidden_act',
              'tied': 'tie_word_embeddings'},
        modules={'transformer.wte': ['model.embed_tokens'],
                 **_blocks('model.layers', 'attention_layernorm', 'self_attn.q_proj self_attn.k_proj self_attn.v_proj',
                           'self_attn.o_proj', 'feedforward_layernorm', 'mlp.up_proj', 'mlp.down_proj'),
                 'transformer.ln_f': ['model.norm'], 'lm_head': ['lm_head']},
        constants=lambda n_embd, n_head: {
            'intermediate_size': 4 * n_embd, 'num_key_value_heads': n_head, 'rms_norm_eps': RMS_EPS,
            'attention_bias': False, 'rope_theta': 10000.0, 'rope_scaling': None,  # as transformers before 5 reads it
            'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0}},
        defaults={'hidden_act': 'xielu', 'tie_word_embeddings': False, 'intermediate_size': 14336,
                  'rms_norm_eps': 1e-5, 'rope_parameters': 'llama3'},
        dropouts=('attention_dropout',), activations={'relu2': 'xielu'}),
}


def find_family(config, to: str) -> str:
    """The name of the family that a GPTConfig is written as. to: 'hf' or 'opt'. Raises InputError if there is none."""
    name = 'opt' if to == 'opt' else 'apertus' if config.positions == 'rotary' else 'gpt2'
    family = FAMILIES[name]
    for key, value in family.parts.items():
        if getattr(config, key) != value:
            other = f'--{key}={value}' if config.arch == family.arch else f'--arch={family.arch}'
            raise InputError(f"the model has {key}={getattr(config, key)!r}, and transformers' {family.cls} only "
                             f'{value!r}: train with {other}, or use --to=onnx, --to=torch'
                             f'{" or --to=hf" * (to == "opt")}')
    return name


# ---- writing ---------------------------------------------------------------------------------------------------------

def write_hf_model(folder: str, name: str, config, weights: Tensors, dtype: torch.dtype, eot: int | None) -> None:
    """
    Write config.json, generation_config.json and model.safetensors of a model of the family `name`, in dtype.

    config: its GPTConfig. eot: the id that ends a text. Raises InputError.
    """
    family = FAMILIES[name]
    write_tensors(os.path.join(folder, 'model.safetensors'), lambda weights: to_theirs(family, config, weights),
                  weights, dtype)
    ends = {'bos_token_id': eot, 'eos_token_id': eot}
    settings = {
        'architectures': [family.cls], 'model_type': name,
        **{key: getattr(config, ours) for ours, key in family.keys.items()},
        family.keys['vocab_size']: config.n_ids, family.keys['tied']: _stays_tied(config),
        family.keys['activation']: family.activations.get(config.activation, config.activation),
        **family.constants(config.n_embd, config.n_head), **dict.fromkeys(family.dropouts, config.dropout), **ends,
        'pad_token_id': None,  # the row of the table that would get no gradient
        'torch_dtype': str(dtype).removeprefix('torch.')}
    if name == 'gpt2':
        settings['n_ctx'] = config.block_size  # an older name, which some software still reads
    for file, content in (('generation_config.json', {} if eot is None else ends | {'pad_token_id': eot}),
                          ('config.json', settings)):
        with open(os.path.join(folder, file), 'w', encoding='utf-8') as f:
            json.dump(content, f, indent=2)


def to_theirs(family: Family, config, weights: Tensors) -> Iterator[tuple[str, Tensor]]:
    """
    Yields (name, tensor): the weights of a model as the family has them, as views if possible.

    The padding of the vocabulary is left out. Absent biases are zeros, and absent gains are ones. A norm of the
    embedding becomes part of the table.
    """
    device = weights['transformer.wte.weight'].device
    for ours, theirs in family.names(config.n_layer, _stays_tied(config)):
        weight, bias = (weights.get(f'{ours}.{end}') for end in ('weight', 'bias'))
        if weight is None:
            weight = torch.ones(config.n_embd, device=device)
        if ours in ('transformer.wte', 'lm_head'):
            weight = weight[:config.n_ids]
        if ours == 'transformer.wte' and config.embd_norm:
            weight = F.rms_norm(weight.float(), (config.n_embd,), eps=RMS_EPS)
        if ours == 'transformer.wpe' and family.first_position:
            weight = F.pad(weight, (0, 0, family.first_position, 0))
        if family.factor(ours, config) != 1:
            weight = weight * family.factor(ours, config)
        if bias is None:
            bias = torch.zeros(len(weight), device=device)
        if family.transposed and ours.endswith(LINEARS):
            weight = weight.t()
        for i, name in enumerate(theirs):
            yield f'{name}.weight', weight.chunk(len(theirs))[i]
            if family.bias and ours not in EMBEDDINGS:
                yield f'{name}.bias', bias.chunk(len(theirs))[i]
    for name, value in family.extras(config):
        yield name, torch.tensor(value, device=device)


def _stays_tied(config):
    """Whether the head is the table there as well. It is not if the norm of the embedding became part of the table."""
    return config.tied and not config.embd_norm


# ---- reading ---------------------------------------------------------------------------------------------------------

def read_hf_model(source: str) -> tuple[dict, Tensors, str, str]:
    """
    (GPTConfig's keys, name -> tensor, the name of the family, the folder) of a model in Hugging Face's format.

    source: a folder or the name of a repository. Raises InputError if the model is of none of the families, or has a
    part that this project does not have.
    """
    settings, theirs, folder = read_hf_folder(source)
    name = settings.get('model_type')
    if name not in FAMILIES:
        raise InputError(f'{source}: config.json has model_type={name!r}; only {", ".join(FAMILIES)} can be loaded')
    family = FAMILIES[name]
    config = _from_settings(family, settings, source)
    own = _from_theirs(family, config, _with_full_names(family, theirs), source)
    return config | {'activation': ACTIVATIONS[config['activation']]}, own, name, folder


def _with_full_names(family, theirs):
    # a model that is saved without its head has no prefix, and old files of GPT-2 have the causal masks
    prefix = family.modules['transformer.wte'][0].split('.')[0] + '.'
    return {name if name.startswith((prefix, 'lm_head.')) else prefix + name: tensor
            for name, tensor in theirs.items() if not name.endswith(('.attn.bias', '.attn.masked_bias'))}


def _from_theirs(family, config, theirs, source):
    """Our weights, name -> tensor. Raises InputError unless they are exactly what `theirs` holds."""
    own = {}
    for ours, names in family.names(config['n_layer'], config['tied']):
        for end in ('weight', 'bias') if family.bias and ours not in EMBEDDINGS else ('weight',):
            parts = [_take(theirs, f'{name}.{end}', source) for name in names]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            own[f'{ours}.{end}'] = whole.t() if family.transposed and ours.endswith(LINEARS) else whole
    if 'transformer.wpe.weight' in own:
        own['transformer.wpe.weight'] = own['transformer.wpe.weight'][family.first_position:]
    if config['tied']:
        own['lm_head.weight'] = own['transformer.wte.weight']
        theirs.pop('lm_head.weight', None)
    family.absorb(config, theirs, own, source)
    for left in theirs:
        raise InputError(f'{source}: the weight {left} is unexpected in the file')
    return own


def _from_settings(family, settings, source):
    """GPTConfig's keys, but with their name of the activation. settings: the content of config.json."""
    given = {**settings}
    if 'rope_parameters' not in given and given.get('rope_scaling', '') is None:  # as transformers before 5 writes it
        given['rope_parameters'] = {'rope_type': 'default', 'rope_theta': given.get('rope_theta')}
    given = family.defaults | {key: value for key, value in given.items() if value is not None}
    config = {'arch': family.arch, **family.parts, 'embd_norm': False, 'bias': family.bias}
    for ours, key in family.keys.items():
        if key not in given:
            raise InputError(f'{source}: config.json has no {key}')
        kind = {'activation': str, 'tied': bool}.get(ours, int)
        if type(given[key]) is not kind or kind is int and given[key] < 1:
            raise InputError(f'{source}: config.json has {key}={given[key]!r}, which cannot be')
        config[ours] = given[key]
    activation = config['activation']
    if activation not in ACTIVATIONS:
        raise InputError(f"{source}: config.json has {family.keys['activation']}={activation!r}; only "
                         f'{", ".join(ACTIVATIONS)} can be loaded')
    for key, needed in family.constants(config['n_embd'], config['n_head']).items():
        if given.get(key, needed) != needed:
            raise InputError(f'{source}: config.json has {key}={given[key]!r}; only {needed!r} can be loaded')
    return config
