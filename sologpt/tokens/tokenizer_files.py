"""
Tokenizers in the files that Hugging Face's libraries read: tokenizer.json and tokenizer_config.json, both ways.

A tokenizer of bytes or characters is read back as such, not as a tokenizer.json. tokenizer_config.json holds its
description under OWN_KEY, with the hash of the tokenizer.json that it belongs to.
"""

import hashlib
import json
import os

from configurator import InputError
from sologpt.tokens.tokenizer import Bytes, Chars, HuggingFace, Tokenizer, no_tokenizer

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
    paths = {name: os.path.join(folder, name) for name in ('tokenizer.json', 'tokenizer_config.json', 'vocab.json')}
    if not os.path.isfile(paths['tokenizer.json']):
        return no_tokenizer(folder) if os.path.isfile(paths['vocab.json']) else None
    eot_token = None
    try:
        if os.path.isfile(paths['tokenizer_config.json']):
            with open(paths['tokenizer_config.json'], encoding='utf-8') as f:
                settings = json.load(f)
            if OWN_KEY in settings:
                with open(paths['tokenizer.json'], 'rb') as f:
                    if hashlib.sha256(f.read()).hexdigest() == settings[OWN_KEY]['sha256']:
                        return dict(settings[OWN_KEY]['tokenizer'])
            eot_token = settings.get('eos_token')
            eot_token = eot_token['content'] if isinstance(eot_token, dict) else eot_token
        return HuggingFace.from_file(paths['tokenizer.json'], eot_token).to_dict()
    except InputError as e:
        return {'kind': 'unknown', 'why': str(e)}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        return {'kind': 'unknown', 'why': f'{paths["tokenizer_config.json"]} is damaged ({type(e).__name__}: {e})'}
