"""
Tokenizers in the files that Hugging Face's libraries read: tokenizer.json and tokenizer_config.json, both ways.

A tokenizer of bytes or characters is read back as such, not as a tokenizer.json. tokenizer_config.json holds its
description under OWN_KEY, with the hash of the tokenizer.json that it belongs to.
"""

import hashlib
import json
import os

from configurator import InputError
from sologpt.tokens.tokenizer_hf import HuggingFace
from sologpt.tokens.tokenizer_kinds import Bytes, Chars, Tokenizer

OWN_KEY = 'sologpt'


def write_tokenizer(folder: str, tokenizer: Tokenizer, block_size: int) -> None:
    """Write both files, as transformers reads them. block_size: the most tokens that the model takes in."""
    content = tokenizer.to_json()
    text = json.dumps(content, ensure_ascii=False, indent=1)
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': block_size,
                'model_input_names': ['input_ids', 'attention_mask'], 'clean_up_tokenization_spaces': False}
    if tokenizer.eot is not None:
        vocab = content['model']['vocab'] | {added['content']: added['id'] for added in content['added_tokens']}
        settings['eos_token'] = settings['bos_token'] = next(t for t, i in vocab.items() if i == tokenizer.eot)
    if isinstance(tokenizer, (Bytes, Chars)):
        settings[OWN_KEY] = {'tokenizer': tokenizer.to_dict(), 'sha256': hashlib.sha256(text.encode()).hexdigest()}
    settings = json.dumps(settings, ensure_ascii=False, indent=1)
    for name, written in (('tokenizer.json', text), ('tokenizer_config.json', settings)):
        with open(os.path.join(folder, name), 'w', encoding='utf-8', newline='') as f:
            f.write(written)


def read_tokenizer(folder: str) -> dict | None:
    """
    The description (see Tokenizer.to_dict) of the tokenizer in a folder in Hugging Face's format, or None without one.

    A tokenizer that cannot be read gives a description of the kind 'unknown', not an error: the model may be used
    without it.
    """
    path = os.path.join(folder, 'tokenizer.json')
    if not os.path.isfile(path):
        return no_tokenizer(folder) if os.path.isfile(os.path.join(folder, 'vocab.json')) else None
    try:
        settings = _read_settings(folder, 'tokenizer_config.json')
        own = settings.get(OWN_KEY)
        if own and _sha256_of_file(path) == own['sha256']:
            return dict(own['tokenizer'])
        eot_token = settings.get('eos_token')
        eot_token = eot_token['content'] if isinstance(eot_token, dict) else eot_token
        return HuggingFace.from_file(path, eot_token, _ends_of_model(folder)).to_dict()
    except InputError as e:
        return {'kind': 'unknown', 'why': str(e)}
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        config = os.path.join(folder, 'tokenizer_config.json')
        return {'kind': 'unknown', 'why': f'{config} is damaged ({type(e).__name__}: {e})'}


def _ends_of_model(folder):
    """The ids that end a text as the model's files say: generation_config.json, or else config.json."""
    for name in ('generation_config.json', 'config.json'):
        ends = _read_settings(folder, name).get('eos_token_id')
        if ends is not None:
            ends = ends if isinstance(ends, list) else [ends]
            if not all(type(i) is int and i >= 0 for i in ends):
                raise InputError(f'{os.path.join(folder, name)} has eos_token_id={ends}, which are no ids')
            return ends
    return []


def _read_settings(folder, name):
    """The content of a JSON file in the folder; {} without one. Raises InputError if it is damaged."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding='utf-8') as f:
            settings = json.load(f)
    except ValueError as e:
        raise InputError(f'{path} is damaged (ValueError: {e})') from None
    if not isinstance(settings, dict):
        raise InputError(f'{path} is damaged: it is no object')
    return settings


def _sha256_of_file(path):
    with open(path, 'rb') as f:
        return hashlib.sha256(f.read()).hexdigest()


def no_tokenizer(source: str) -> dict:
    """The description for a model whose tokenizer is not at hand. source: the name of the model."""
    return {'kind': 'unknown', 'why': f'{source} has no tokenizer.json'}
