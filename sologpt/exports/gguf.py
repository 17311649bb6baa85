"""
A model as one GGUF file, which llama.cpp runs, and so do Ollama and LM Studio: weights, config and tokenizer.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, written by the package `gguf`. The names of keys
and tensors are those that llama.cpp reads for its architectures 'llama', 'qwen2' and 'qwen3'. A Mistral is a 'llama'.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from configurator import InputError
from sologpt.exports.gguf_tokenizer import TokenizerFiles, known_differences, tokenizer_keys
from sologpt.files.safetensors_files import Tensors, cast_weight

Tensor = torch.Tensor
Pairs = Iterable[tuple[str, Tensor]]  # Hugging Face's name, and the tensor

ARCHITECTURES = {'llama': 'llama', 'mistral': 'llama', 'qwen2': 'qwen2', 'qwen3': 'qwen3'}  # model_type -> llama.cpp's
FORMATS = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16', 'q8_0': 'Q8_0'}  # dtype -> its name in GGUF
FILE_TYPES = {'F32': 0, 'F16': 1, 'BF16': 32, 'Q8_0': 7}  # a number of most of the tensors, which only describes
CAST = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}

OUTSIDE = {'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output'}
INSIDE = {  # of a block
    'input_layernorm': 'attn_norm', 'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output', 'self_attn.q_norm': 'attn_q_norm',
    'self_attn.k_norm': 'attn_k_norm', 'post_attention_layernorm': 'ffn_norm', 'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down'}


def write_gguf_file(path: str, settings: dict, convert: Callable[[Tensors], Pairs], weights: Tensors,
                    text: TokenizerFiles, name: str, dtype: str) -> str:
    """
    Write a GGUF file. Returns what it is, in words.

    settings: the content of config.json. convert, weights: as for write_tensors(); convert() yields what
    model.safetensors holds, and one tensor at a time becomes what the GGUF file holds. name: of the model, for people.
    dtype: of the matrices, a key of FORMATS. In 'q8_0', 32 numbers of a row have 8 bits each, and a scale of 16 bits.
    Vectors are float32. Raises InputError.
    """
    gguf = import_gguf()
    if dtype not in FORMATS:
        raise InputError(f'dtype={dtype!r} is not known: use {", ".join(FORMATS)}')
    keys = {'general.name': name, 'general.file_type': FILE_TYPES[FORMATS[dtype]], **model_keys(settings),
            **tokenizer_keys(text, settings)}
    if dtype == 'q8_0':
        keys['general.quantization_version'] = gguf.GGML_QUANT_VERSION
    writer, formats = gguf.GGUFWriter(None, ARCHITECTURES[settings['model_type']]), {}
    for key, value in keys.items():
        add_key(writer, key, value)
    no_values = {ours: tensor.to('meta') for ours, tensor in weights.items()}
    for tensor_name, tensor in to_gguf(convert(no_values), settings):
        formats[tensor_name] = format_of(tensor, FORMATS[dtype])
        kind = gguf.GGMLQuantizationType[formats[tensor_name]]
        block, size = gguf.GGML_QUANT_SIZES[kind]  # numbers in a block, and its bytes
        writer.add_tensor_info(tensor_name, tensor.shape, np.float32, tensor.numel() // block * size, raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, tensor in to_gguf(convert(weights), settings):
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
    return '; '.join([f'{settings["model_type"]} in {dtype} for llama.cpp, {len(formats)} tensors', *words])


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


# ---- config.json -----------------------------------------------------------------------------------------------------

def model_keys(settings: dict) -> dict:
    """The keys about the model, from the content of config.json. Raises InputError for what llama.cpp does not do."""
    model_type = settings.get('model_type')
    if model_type not in ARCHITECTURES:
        raise InputError(f'model_type={model_type!r} cannot be written as GGUF here: only {", ".join(ARCHITECTURES)}')
    check_windows(settings)
    if model_type == 'qwen3' and settings.get('attention_bias'):
        raise InputError('attention_bias=true: llama.cpp has no bias of o_proj for qwen3')
    heads, kv_heads, head_dim = attention_sizes(settings)
    keys = {
        'block_count': settings['num_hidden_layers'],
        'context_length': settings['max_position_embeddings'],
        'embedding_length': settings['hidden_size'],
        'feed_forward_length': settings['intermediate_size'],
        'vocab_size': settings['vocab_size'],
        'attention.head_count': heads,
        'attention.head_count_kv': kv_heads,
        'attention.key_length': head_dim,
        'attention.value_length': head_dim,
        'attention.layer_norm_rms_epsilon': float(settings.get('rms_norm_eps', 1e-6)),
        'rope.dimension_count': head_dim,
        **rope_keys(settings),
    }
    return {f'{ARCHITECTURES[model_type]}.{key}': value for key, value in keys.items()}


def attention_sizes(settings: dict) -> tuple[int, int, int]:
    """Heads, heads of keys and values, and the width of a head. Defaults are those of transformers."""
    model_type, heads = settings['model_type'], settings['num_attention_heads']
    kv_heads = settings.get('num_key_value_heads', {'mistral': 8, 'qwen2': 32, 'qwen3': 32}.get(model_type))
    head_dim = settings.get('head_dim', 128 if model_type == 'qwen3' else None)
    return heads, kv_heads or heads, head_dim or settings['hidden_size'] // heads


def check_windows(settings: dict) -> None:
    """Raises InputError if a block attends to a window of the last tokens, which llama.cpp ignores for these models."""
    layers = settings['num_hidden_layers']
    if settings['model_type'] == 'mistral':
        window, windowed = settings.get('sliding_window', 4096), layers
    elif settings.get('use_sliding_window'):
        kinds = settings.get('layer_types')
        windowed = (kinds.count('sliding_attention') if kinds else layers - settings.get('max_window_layers', 28))
        window = settings.get('sliding_window', 4096)
    else:
        return
    if window is not None and windowed > 0 and window < settings['max_position_embeddings']:
        raise InputError(f'sliding_window={window} is in use, and llama.cpp ignores it for {settings["model_type"]}: '
                         f'beyond {window} tokens its text would differ')


def rope_of(settings: dict) -> dict:
    """Settings of the rotary embedding in one form, for those of transformers 4 and 5."""
    given = settings.get('rope_parameters') or settings.get('rope_scaling') or {}
    theta = given.get('rope_theta', settings.get('rope_theta', 10000.0))
    kind = given.get('rope_type', given.get('type', 'default'))
    return {'original_max_position_embeddings': settings['max_position_embeddings'],
            **given, 'rope_theta': theta, 'rope_type': kind}


def rope_keys(settings: dict) -> dict:
    """The keys about the rotary embedding. Those of llama3 are in a tensor, see rope_factors(). Raises InputError."""
    rope = rope_of(settings)
    keys, kind = {'rope.freq_base': float(rope['rope_theta'])}, rope['rope_type']
    if kind not in ('default', 'linear', 'yarn', 'llama3'):
        raise InputError(f'rope_scaling of the type {kind!r} cannot be written as GGUF: llama.cpp does not compute '
                         f'it as transformers does')
    if kind in ('linear', 'yarn'):
        keys |= {'rope.scaling.type': kind, 'rope.scaling.factor': float(rope['factor'])}
    if kind == 'yarn':
        default = 0.1 * math.log(rope['factor']) + 1
        usual = {'beta_fast': 32, 'beta_slow': 1, 'truncate': True, 'attention_factor': default, 'mscale': None,
                 'mscale_all_dim': None}
        for key, value in usual.items():
            if rope.get(key) not in (None, value):
                raise InputError(f'rope_scaling has {key}={rope[key]}, which is not written to GGUF here: only {value}')
        keys['rope.scaling.original_context_length'] = rope['original_max_position_embeddings']
    return keys


def rope_factors(settings: dict) -> Tensor:
    """
    What llama3's scaling divides each frequency by, (head_dim / 2,) in float32: 1 for wavelengths that the original
    context holds often, `factor` for those that it does not hold, and between them a mixture.
    """
    rope, head_dim = rope_of(settings), attention_sizes(settings)[2]
    low, high = rope['low_freq_factor'], rope['high_freq_factor']
    frequencies = rope['rope_theta'] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = rope['original_max_position_embeddings'] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - kept) / rope['factor'] + kept)).float()


# ---- tensors ---------------------------------------------------------------------------------------------------------

def to_gguf(tensors: Pairs, settings: dict) -> Pairs:
    """The tensors by the names of GGUF, and as llama.cpp expects them. Raises InputError for an unknown one."""
    rotates_pairs = ARCHITECTURES[settings['model_type']] == 'llama'
    heads, kv_heads, _ = attention_sizes(settings)
    if rope_of(settings)['rope_type'] == 'llama3':
        yield 'rope_freqs.weight', rope_factors(settings)
    for name, tensor in tensors:
        is_second_embedding = name == 'lm_head.weight' and settings.get('tie_word_embeddings')
        if is_second_embedding or name.endswith('rotary_emb.inv_freq'):
            continue
        if rotates_pairs and '.q_proj.' in name:
            tensor = interleave(tensor, heads)
        elif rotates_pairs and '.k_proj.' in name:
            tensor = interleave(tensor, kv_heads)
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
