"""
The content of a tokenizer.json, the file that Hugging Face's `tokenizers` reads: https://hf.co/docs/tokenizers

In a byte-level BPE, each byte is written as one visible character, as in GPT-2: itself if it is one, otherwise a
character from U+0100 on. A space is written as U+0120.
"""

_VISIBLE = [*range(ord('!'), ord('~') + 1), *range(0xa1, 0xad), *range(0xae, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _VISIBLE]
CHAR_BYTES = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
BYTE_CHARS = {byte: char for char, byte in CHAR_BYTES.items()}


def chars_of_token(token: bytes) -> str:
    """A token of a byte-level BPE as a tokenizer.json writes it: b' the' -> 'Ġthe'."""
    return ''.join(BYTE_CHARS[byte] for byte in token)


def byte_level_json(vocab: dict[str, int], merges: list[str], special: dict[str, int],
                    pattern: str | None = None) -> dict:
    """
    A byte-level BPE.

    vocab: token -> id, special tokens included. merges: 'left right', the first one first. special: special tokens.
    pattern: how text is split into words; None: not at all.
    """
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
    model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
             'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
             'vocab': vocab, 'merges': merges}
    split = {'type': 'Sequence', 'pretokenizers': [split_step(pattern), level]} if pattern else level
    return tokenizer_json(model, split, level, special)


def split_step(pattern: str) -> dict:
    """The step that splits text into the matches of a regular expression and what lies between them."""
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


def tokenizer_json(model: dict, pre_tokenizer: dict, decoder: dict, special: dict[str, int]) -> dict:
    """The whole file, from its parts. special: token -> id of the special tokens."""
    added = [{'id': i, 'content': token, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
              'special': True} for token, i in sorted(special.items(), key=lambda item: item[1])]
    return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'normalizer': None,
            'pre_tokenizer': pre_tokenizer, 'post_processor': None, 'decoder': decoder, 'model': model}
