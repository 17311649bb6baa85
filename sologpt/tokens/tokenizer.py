"""
Text to token ids and back, by the name that a command line gives or by the description that a file holds.

A tokenizer is described by a dict of plain values, to_dict(). It lies in the meta.json of a data folder and in every
checkpoint, so that sampling needs nothing else. Not handled: SentencePiece models, and a tokenizer.json of another kind
than tokenizer_hf.py names.
"""

import os
import re

from configurator import InputError
from sologpt.tokens.tokenizer_files import no_tokenizer, read_tokenizer
from sologpt.tokens.tokenizer_hf import HuggingFace
from sologpt.tokens.tokenizer_kinds import Bytes, Chars, Tiktoken, Tokenizer

GPT2 = {'kind': 'tiktoken', 'name': 'gpt2'}  # the tokenizer of files that name none, as in nanoGPT
GPT2_VOCAB, GPT2_EOT = 50257, 50256


def tokenizer_by_name(name: str) -> Tokenizer:
    """
    The tokenizer that a command line names: 'bytes', one of tiktoken's encodings, or the path of FILE.tiktoken, of a
    tokenizer.json, or of a model's folder, whose other files say what ends a text; or a model on the hub, such as
    'HuggingFaceTB/SmolLM2-135M'. Raises InputError.
    """
    import tiktoken
    if name == 'bytes':
        return Bytes()
    if name in tiktoken.list_encoding_names():
        return Tiktoken(name)
    if os.path.isdir(name):
        return _tokenizer_of_folder(name)
    if name.endswith('.json'):
        return HuggingFace.from_file(name)
    if name.endswith('.tiktoken'):
        return Tiktoken.from_file(name)
    if re.fullmatch(r'[\w.-]+/[\w.-]+', name):
        return _tokenizer_of_folder(_download(name))
    raise InputError(f'--tokenizer={name} is not known: use bytes, chars, one of tiktoken '
                     f'({", ".join(tiktoken.list_encoding_names())}), the path of FILE.tiktoken, of a tokenizer.json '
                     f"or of a model's folder, or the name of a model on the hub")


def _download(name):
    """The folder with the tokenizer's files of a model on the hub."""
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(name, allow_patterns=['*.json'], ignore_patterns=['*.index.json'])
    except Exception as e:  # errors of huggingface_hub, and of the HTTP library under it
        raise InputError(f'--tokenizer={name} is no local folder, and downloading its tokenizer failed '
                         f'({type(e).__name__}): connect to the network, or give a folder that has it') from None


def _tokenizer_of_folder(folder):
    described = read_tokenizer(folder) or no_tokenizer(folder)
    if described['kind'] == 'unknown':
        raise InputError(f'--tokenizer={folder}: {described["why"]}')
    return tokenizer_from_dict(described)


# ---- descriptions ----------------------------------------------------------------------------------------------------

def tokenizer_from_dict(described: dict) -> Tokenizer:
    """The tokenizer that to_dict() has described. Raises InputError."""
    kind = described.get('kind')
    if kind == 'bytes':
        return Bytes()
    if kind == 'chars':
        return Chars(described['chars'])
    if kind == 'tiktoken':
        if 'ranks' not in described:
            return Tiktoken(described['name'])
        return Tiktoken.from_ranks(*(described[key] for key in ('name', 'ranks', 'pattern', 'special')))
    if kind == 'json':
        return HuggingFace(described['json'], described['eot'], described.get('bos'), described.get('ends'))
    if kind == 'unknown':
        raise InputError(f'{described["why"]}: set dataset to a folder in data/ with the tokenizer that the model has')
    raise InputError(f'unknown tokenizer {kind!r}: known are bytes, chars, tiktoken and json')


def eot_of(described: dict) -> int | None:
    """The id that ends a text, for a description by to_dict(). GPT-2's needs no download. Raises InputError."""
    if described.get('kind') == 'json':  # it may be large, and says so itself
        return described['eot']
    return GPT2_EOT if described == GPT2 else tokenizer_from_dict(described).eot


def document_begin_of(described: dict) -> int | None:
    """The id with which documents begin in prepared data: `bos`, else the end of the one before. Raises InputError."""
    bos = described.get('bos')
    return eot_of(described) if bos is None else bos


def tokenizers_agree(described: dict | None, own: dict) -> bool:
    """
    Whether two descriptions may be of the same tokenizer, although one of them may come from a tokenizer.json.

    described: that of a model; None if it names none. own: that of a data folder.
    """
    if described is None or described == own or described.get('kind') == 'unknown':
        return True
    kinds = {described.get('kind'), own['kind']}
    if kinds == {'tiktoken'}:
        return described['name'] == own['name'] and len({d['ranks'] for d in (described, own) if 'ranks' in d}) < 2
    if 'json' not in kinds:
        return False
    if 'json' in described and described['json'] == own.get('json'):
        return True
    (n, some), (m, others) = (_vocabulary(one) for one in (described, own))
    return n == m and (some.items() <= others.items() or others.items() <= some.items())


def _vocabulary(described):
    """(number of ids, token -> id as in a tokenizer.json). For GPT-2's, which may not be at hand, it has one token."""
    if described == GPT2:
        return GPT2_VOCAB, {'Ġthe': 262}
    tokenizer = tokenizer_from_dict(described)
    is_json = isinstance(tokenizer, HuggingFace)
    return tokenizer.vocab_size, tokenizer.vocabulary() if is_json else tokenizer.to_json()['model']['vocab']
