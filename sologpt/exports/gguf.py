"""
A model as one GGUF file, which llama.cpp runs, and so do Ollama and LM Studio: weights, config and tokenizer.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, written by the package `gguf`. The names of keys
and tensors are those that llama.cpp reads for its architectures 'llama', 'qwen2' and 'qwen3'. A Mistral is a 'llama'.
"""

import math
import os
from collections.abc import Iterable

import numpy as np
import torch

from configurator import InputError
from model import GPTConfig
from sologpt.exports.gguf_tokenizer import TokenizerFiles, known_differences, tokenizer_keys
from sologpt.exports.source import ExportedModel
from sologpt.files.companions import chat_template, read_settings
from sologpt.files.families import FAMILIES
from sologpt.files.family import Tensors
from sologpt.files.hf_models import to_theirs
from sologpt.files.safetensors_files import cast_weight
from sologpt.matmuls.rotary import frequencies

Tensor = torch.Tensor
Pairs = Iterable[tuple[str, Tensor]]  # Hugging Face's name, and the tensor

ARCHITECTURES = {'llama': 'llama', 'mistral': 'llama', 'qwen2': 'qwen2', 'qwen3': 'qwen3'}  # family -> llama.cpp's
FORMATS = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16', 'q8_0': 'Q8_0'}  # dtype -> its name in GGUF
FILE_TYPES = {'F32': 0, 'F16': 1, 'BF16': 32, 'Q8_0': 7}  # a number of most of the tensors, which only describes
CAST = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}

OUTSIDE = {'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output'}
INSIDE = {  # of a block
    'input_layernorm': 'attn_norm', 'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output', 'self_attn.q_norm': 'attn_q_norm',
    'self_attn.k_norm': 'attn_k_norm', 'post_attention_layernorm': 'ffn_norm', 'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down'}


def write_gguf(exported: ExportedModel, folder: str, dest: str, dtype: str, dataset: str) -> str:
    """
    Write model.gguf. Returns what it is, in words. dest: where `folder` will lie; its name is the model's. dataset: see
    find_tokenizer(). Raises InputError.
    """
    return write_gguf_file(os.path.join(folder, 'model.gguf'), exported.config, exported.find_family(),
                           exported.weights, tokenizer_of(exported, dataset), os.path.basename(os.path.abspath(dest)),
                           dtype)


def tokenizer_of(exported: ExportedModel, dataset: str) -> TokenizerFiles:
    """The tokenizer of a model: that of the files that came along, or else find_tokenizer()'s. Raises InputError."""
    if not exported.kept:
        text = exported.find_tokenizer(dataset)
        return TokenizerFiles(text.to_json(), {}, [text.eot] if text.eot is not None else [])
    files = {name: read_settings(exported.kept, f'{name}.json')
             for name in ('tokenizer', 'tokenizer_config', 'generation_config', 'config')}
    if not files['tokenizer']:
        raise InputError(f'{exported.source} has no tokenizer.json, from which the tokenizer of a GGUF file is made')
    ends = files['generation_config'].get('eos_token_id', files['config'].get('eos_token_id'))
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return TokenizerFiles(files['tokenizer'], files['tokenizer_config'], ends, chat_template(exported.kept),
                          files['config'].get('bos_token_id'))


def write_gguf_file(path: str, config: GPTConfig, family: str, weights: Tensors, text: TokenizerFiles, name: str,
                    dtype: str) -> str:
    """
    Write a GGUF file. Returns what it is, in words.

    family: a key of FAMILIES. weights: ours; one at a time becomes what the file holds. name: of the model, for people.
    dtype: of the matrices, a key of FORMATS. In 'q8_0', 32 numbers of a row have 8 bits each, and a scale of 16 bits.
    Vectors are float32. Raises InputError.
    """
    gguf = import_gguf()
    if dtype not in FORMATS:
        raise InputError(f'dtype={dtype!r} is not known: use {", ".join(FORMATS)}')
    keys = {'general.name': name, 'general.file_type': FILE_TYPES[FORMATS[dtype]], **model_keys(config, family),
            **tokenizer_keys(text, config.vocab_size)}
    if dtype == 'q8_0':
        keys['general.quantization_version'] = gguf.GGML_QUANT_VERSION

    def convert(weights):
        return to_gguf(to_theirs(FAMILIES[family], config, weights, config.vocab_size), config, family)
    writer, formats = gguf.GGUFWriter(None, ARCHITECTURES[family]), {}
    for key, value in keys.items():
        add_key(writer, key, value)
    no_values = {ours: tensor.to('meta') for ours, tensor in weights.items()}
    for tensor_name, tensor in convert(no_values):
        formats[tensor_name] = format_of(tensor, FORMATS[dtype])
        kind = gguf.GGMLQuantizationType[formats[tensor_name]]
        block, size = gguf.GGML_QUANT_SIZES[kind]  # numbers in a block, and its bytes
        writer.add_tensor_info(tensor_name, tensor.shape, np.float32, tensor.numel() // block * size, raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, tensor in convert(weights):
            writer.write_tensor_data(encode(tensor_name, tensor, formats[tensor_name]))
    except OSError as e:
        raise InputError(f'could not write {path}: {e.strerror}') from None
    finally:
        writer.close()
    words, odd = known_differences(text), [key for key, written in formats.items() if written != FORMATS[dtype]
                                           and written == 'F16']
    if odd:
        words.append(f'{len(odd)} matrices are float16, because their rows are no multiples of 32: {", ".join(odd[:3])}'
                     f'{", ..." if len(odd) > 3 else ""}')
    return '; '.join([f'{family} in {dtype} for llama.cpp, {len(formats)} tensors', *words])


def import_gguf():
    """The package `gguf`. Raises InputError without it."""
    try:
        import gguf
    except ImportError:
        raise InputError('to=gguf needs the package gguf: pip install gguf') from None
    return gguf


def add_key(writer, key: str, value: bool | int | float | str | list) -> None:
    """Add a key to a GGUFWriter, in the type that llama.cpp expects for such a value."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}[type(value)]
    add(key, value)


# ---- the model -------------------------------------------------------------------------------------------------------

def model_keys(config: GPTConfig, family: str) -> dict:
    """The keys about the model. Raises InputError for what llama.cpp does not do."""
    if family not in ARCHITECTURES:
        raise InputError(f'a model of the family {family} cannot be written as GGUF here: only '
                         f'{", ".join(ARCHITECTURES)}')
    window = min(config.window_of(i) or math.inf for i in range(config.n_layer))
    if window < config.block_size:
        raise InputError(f'sliding_window={window} is in use, and llama.cpp ignores it for {family}: beyond {window} '
                         f'tokens its text would differ')
    if family == 'qwen3' and config.bias:
        raise InputError('attention_bias=true: llama.cpp has no bias of o_proj for qwen3')
    keys = {
        'block_count': config.n_layer, 'context_length': config.block_size, 'embedding_length': config.n_embd,
        'feed_forward_length': config.n_inner, 'vocab_size': config.vocab_size,
        'attention.head_count': config.n_head, 'attention.head_count_kv': config.n_kv_head,
        'attention.key_length': config.head_dim, 'attention.value_length': config.head_dim,
        'attention.layer_norm_rms_epsilon': float(config.norm_eps), 'rope.dimension_count': config.head_dim,
        'rope.freq_base': float(config.rope_base), **scaling_keys(config.rope_scaling or {}),
    }
    return {f'{ARCHITECTURES[family]}.{key}': value for key, value in keys.items()}


def scaling_keys(scaling: dict) -> dict:
    """
    The keys about the scaling of rotary positions. That of llama3 is in a tensor instead, rope_freqs. Raises
    InputError.
    """
    kind = scaling.get('rope_type')
    if kind == 'dynamic':
        raise InputError("rope_scaling of the type 'dynamic' cannot be written as GGUF: llama.cpp does not have it")
    if kind not in ('linear', 'yarn'):
        return {}
    keys = {'rope.scaling.type': kind, 'rope.scaling.factor': float(scaling['factor'])}
    if kind == 'yarn':
        usual = {'beta_fast': 32, 'beta_slow': 1, 'truncate': True, 'mscale': None, 'mscale_all_dim': None,
                 'attention_factor': 0.1 * math.log(scaling['factor']) + 1}
        for key, value in usual.items():
            if scaling.get(key) not in (None, value):
                raise InputError(f'rope_scaling has {key}={scaling[key]}, which is not written to GGUF here: only '
                                 f'{value}')
        keys['rope.scaling.original_context_length'] = scaling['original_max_position_embeddings']
    return keys


# ---- tensors ---------------------------------------------------------------------------------------------------------

def to_gguf(tensors: Pairs, config: GPTConfig, family: str) -> Pairs:
    """
    Hugging Face's tensors by the names of GGUF, and as llama.cpp expects them. Raises InputError for an unknown one.
    """
    rotates_pairs = ARCHITECTURES[family] == 'llama'
    if (config.rope_scaling or {}).get('rope_type') == 'llama3':  # llama.cpp divides the plain frequencies by these
        plain, scaled = (frequencies(config.head_dim, config.rope_base, scaling)[0]
                         for scaling in (None, config.rope_scaling))
        yield 'rope_freqs.weight', plain / scaled
    for name, tensor in tensors:
        if rotates_pairs and '.q_proj.' in name:
            tensor = interleave(tensor, config.n_head)
        elif rotates_pairs and '.k_proj.' in name:
            tensor = interleave(tensor, config.n_kv_head)
        yield gguf_name(name), tensor


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """
    The rows of a weight (heads * head_dim, in) or bias in llama.cpp's order. Its 'llama' rotates rows 2i and 2i + 1 of
    a head together, where Hugging Face's rotates i and i + head_dim / 2.
    """
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(tensor.shape)


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight. Raises InputError for a tensor without such a name."""
    module, _, end = name.rpartition('.')
    if module in OUTSIDE:
        return f'{OUTSIDE[module]}.{end}'
    block, _, inside = module.removeprefix('model.layers.').partition('.')
    if inside not in INSIDE:
        raise InputError(f'the tensor {name} has no place in a GGUF file')
    return f'blk.{block}.{INSIDE[inside]}.{end}'


def format_of(tensor: Tensor, wanted: str) -> str:
    """The format of a tensor in the file: float32 for vectors, and float16 for rows that q8_0 cannot divide."""
    if tensor.dim() == 1:
        return 'F32'
    return 'F16' if wanted == 'Q8_0' and tensor.shape[-1] % 32 else wanted


def encode(name: str, tensor: Tensor, written: str) -> np.ndarray:
    """The numbers of a tensor in a format. Raises InputError if they are too large for it."""
    if written == 'Q8_0':
        from gguf.quants import GGMLQuantizationType, quantize
        return quantize(cast_weight(name, tensor, torch.float32).numpy(), GGMLQuantizationType.Q8_0)
    numbers = cast_weight(name, tensor, CAST[written])
    return (numbers.view(torch.int16) if written == 'BF16' else numbers).numpy()  # numpy has no bfloat16
