"""
The tokenizer of a tokenizer.json, the file of Hugging Face's `tokenizers`: https://hf.co/docs/tokenizers

    byte-level BPE         a token is a sequence of bytes, as in GPT-2, Llama 3, SmolLM2 and Qwen
    SentencePiece's BPE    a token is text, with U+2581 for a space, or one byte: <0x0A>; as in Llama 2 and Mistral 7B
    WordLevel              a token is a word or a character, and stands for itself

The files of other kinds are refused: WordPiece, Unigram, and a BPE that has no bytes for characters it does not know.
"""

import functools
import json
import re
import threading
from collections.abc import Iterable

import numpy as np

from configurator import InputError
from sologpt.tokens.tokenizer_json import CHAR_BYTES
from sologpt.tokens.tokenizer_kinds import END_OF_TEXT, Tokenizer

SPACE = '\u2581'  # a space in SentencePiece's tokens
OF_BYTE = re.compile('<0x([0-9A-F]{2})>')  # a token that is one byte
BYTE_FALLBACK = ['Replace', 'ByteFallback', 'Fuse']  # the steps of a decoder for such tokens


class HuggingFace(Tokenizer):
    """
    A tokenizer.json. What would put tokens around each text, cut it off or pad it is left out of it.

    SentencePiece's tokenizers put a space before each text, so that its first word is as in the middle of a text. Only
    decode() takes it off again, because only it knows that a text begins. to_bytes() keeps it: the ids that it is given
    may go on with a text, and then their first space belongs to that.
    """

    def __init__(self, text: str, eot: int | None = None, bos: int | None = None, ends: Iterable[int] | None = None):
        """
        text: the content of the file. eot: the id that ends a text. bos: the id that stands before every text. ends:
        all ids that end a text; None: eot alone. Raises InputError for files of other kinds.
        """
        self.file = _parse(text)
        self.text, self.vocab_size, self.eot, self.bos = self.file.text, self.file.vocab_size, eot, bos
        self._ends = super().ends if ends is None else tuple(ends)

    @property
    def ends(self) -> tuple[int, ...]:
        return self._ends

    @classmethod
    def from_file(cls, path: str, eot_token: str | None = END_OF_TEXT, ends: Iterable[int] = ()) -> 'HuggingFace':
        """
        The tokenizer of a file. eot_token: the token that ends a text; if the vocabulary does not have it, none does.
        ends: ids that end a text too. Raises InputError.

        `bos` is the one token that the file's post_processor puts before every text. As in transformers,
        add_bos_token in tokenizer_config.json has no effect beside a tokenizer.json.
        """
        try:
            with open(path, encoding='utf-8') as f:
                content = json.loads(f.read())
            found = _parse(_without_surroundings(content))
            eot = found.backend.token_to_id(eot_token or '')
            own = [] if eot is None else [eot]
            every = sorted({*own, *(i for i in ends if i < found.vocab_size)})
            return cls(found.text, eot, _bos_of(content.get('post_processor')), every)
        except (OSError, InputError) as e:
            raise InputError(f'{path} cannot be read: {e}') from None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f'{path} cannot be read: it is damaged ({type(e).__name__}: {e})') from None

    def encode(self, text):
        return _encode(self.file.backend, text)

    def encode_ordinary(self, text):
        return np.array(_encode(self.file.ordinary, text), dtype=np.uint32)

    def to_bytes(self, ids):
        return b''.join(self.file.bytes.get(i, b'') for i in ids)

    def decode(self, ids):
        text = super().decode(ids)
        return text.removeprefix(' ') if self.file.spaced else text

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, as the file has it, without tokens that were added to it."""
        return self.file.backend.get_vocab(with_added_tokens=False)

    def to_dict(self):
        described = {'kind': 'json', 'json': self.text, 'eot': self.eot}
        if self.bos is not None:
            described['bos'] = self.bos
        if self.ends != super().ends:
            described['ends'] = list(self.ends)
        return described

    def to_json(self):
        return json.loads(self.text)


# ---- the file --------------------------------------------------------------------------------------------------------

class _File:
    """What follows from the text of a tokenizer.json alone. That of a large vocabulary takes a second to read."""

    def __init__(self, text):
        """Raises InputError if it is damaged, or of another kind."""
        import tokenizers
        try:
            self.backend = tokenizers.Tokenizer.from_str(text)
            self.text = text if _has_no_surroundings(self.backend) else _without_surroundings(json.loads(text))
            self.backend.post_processor = None
            self.backend.no_truncation()
            self.backend.no_padding()
            decoder = _steps(self.backend.decoder)
        except Exception as e:  # tokenizers raises nothing more precise
            raise InputError(f'it is damaged or of another version: {str(e)[:100]}') from None
        names, model = [step['type'] for step in decoder], self.backend.model
        kind, ids = type(model).__name__, self.backend.get_vocab(with_added_tokens=True)
        is_plain = names in (['ByteLevel'], ['Fuse']) and kind in ('BPE', 'WordLevel')
        has_bytes = kind == 'BPE' and model.byte_fallback and all(f'<0x{byte:02X}>' in ids for byte in range(256))
        if not (is_plain or has_bytes and _has_spaces(decoder)) or not self.backend.get_vocab_size(False):
            raise InputError(f'its model is {kind} and its decoder {", ".join(names) or None}: only byte-level BPE, '
                             f"like that of GPT-2, SentencePiece's BPE with bytes, like that of Llama 2, and WordLevel "
                             f'with Fuse can be read')
        self.vocab_size, self.bytes_of = max(ids.values()) + 1, _BYTES.get(names[0], _bytes_of_piece)
        self.spaced = names[-1] == 'Strip' or _prepends(decoder[-1])  # a space is put before each text
        self._ordinary, self._lock = None, threading.Lock()

    @property
    def ordinary(self):
        """The tokenizer for which the names of special tokens are ordinary text. It is large, so threads share one."""
        import tokenizers
        with self._lock:
            if self._ordinary is None:
                ordinary = tokenizers.Tokenizer.from_str(self.text)
                ordinary.encode_special_tokens = True
                self._ordinary = ordinary
        return self._ordinary

    @functools.cached_property
    def bytes(self) -> dict[int, bytes]:
        return {i: self.bytes_of(token) for token, i in self.backend.get_vocab(with_added_tokens=True).items()}


_parse = functools.lru_cache(maxsize=2)(_File)  # two: that of a model, and that of data


def _without_surroundings(content):
    """The text of the file without the steps that put tokens around each text, cut it off or pad it."""
    without = content | {'post_processor': None, 'truncation': None, 'padding': None}
    return json.dumps(without, ensure_ascii=False, separators=(',', ':'))


def _has_no_surroundings(backend):
    return backend.post_processor is None and backend.truncation is None and backend.padding is None


def _steps(decoder):
    """The steps of a decoder as the file has them: it may be a sequence, or None."""
    step = json.loads(decoder.__getstate__()) if decoder else {'type': 'Sequence', 'decoders': []}
    return step['decoders'] if step['type'] == 'Sequence' else [step]


def _has_spaces(decoder):
    """Whether the steps make spaces of U+2581, take off at most the first one, and change nothing else but bytes."""
    names = [step['type'] for step in decoder]
    if names == ['Metaspace']:
        return decoder[0]['replacement'] == SPACE
    if names[:3] != BYTE_FALLBACK or (decoder[0]['pattern'], decoder[0]['content']) != ({'String': SPACE}, ' '):
        return False
    strips = [(step['type'], step['content'], step['start'], step['stop']) for step in decoder[3:]]
    return strips in ([], [('Strip', ' ', 1, 0)])


def _prepends(step):
    return step['type'] == 'Metaspace' and step.get('prepend_scheme', 'always') != 'never'


def _bytes_of_chars(token):
    """The bytes of a token of a byte-level BPE. An added token may be plain text."""
    return bytes(CHAR_BYTES[c] for c in token) if all(c in CHAR_BYTES for c in token) else token.encode()


def _bytes_of_piece(token):
    """The bytes of a token of SentencePiece's."""
    of_byte = OF_BYTE.fullmatch(token)
    return bytes([int(of_byte[1], 16)]) if of_byte else token.replace(SPACE, ' ').encode()


_BYTES = {'ByteLevel': _bytes_of_chars, 'Fuse': str.encode}  # the first step of a decoder -> the bytes of a token


def _bos_of(post_processor) -> int | None:
    """The id that a post-processor puts before every text, if it is one id."""
    for step in (post_processor or {}).get('processors', [post_processor] if post_processor else []):
        if step.get('type') == 'TemplateProcessing':
            before = []
            for piece in step['single']:
                if 'SpecialToken' not in piece:
                    break
                before += step['special_tokens'][piece['SpecialToken']['id']]['ids']
            return before[0] if len(before) == 1 else None
    return None


def _encode(backend, text):
    try:
        return backend.encode(text, add_special_tokens=False).ids
    except Exception as e:  # it raises nothing more precise
        raise InputError(f'the tokenizer has no tokens for all of the text: {str(e)[:100]}') from None
