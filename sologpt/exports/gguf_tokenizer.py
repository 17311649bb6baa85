r"""
A tokenizer.json as the keys of a GGUF file, from which llama.cpp makes its own tokenizer.

llama.cpp has two that fit the models here. 'gpt2' is a byte-level BPE. It takes the merges, and the name of a rule for
splitting text into words. 'llama' is the BPE of SentencePiece. It has no merges: any two neighbours that are a token
together may be joined, and the token with the highest score comes first. So it does what `tokenizers` does only if the
merges are all such pairs, and those of one token stand together.

Not handled: Unigram, WordPiece, WordLevel, and rules for splitting that llama.cpp has under other names.
"""

from dataclasses import dataclass
from itertools import groupby

from configurator import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens in GGUF
BYTE_TOKENS = {f'<0x{byte:02X}>' for byte in range(256)}
SPACE = '\u2581'  # how SentencePiece writes a space

# How text is split into words, step by step -> its name in llama.cpp. The second is how the tokenizer.json of
# tiktoken's gpt2 says the first, see Tiktoken.to_json().
DIGITS = 'each digit alone'
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TIKTOKEN_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+\z|\s+(?!\S)|\s"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace('{1,3}', '')
WORDS = {(GPT2,): 'gpt-2', (TIKTOKEN_GPT2,): 'gpt-2', (DIGITS, GPT2): 'smollm', (LLAMA3,): 'llama-bpe',
         (QWEN2,): 'qwen2'}


@dataclass
class TokenizerFiles:
    """What Hugging Face's files say about the tokenizer of a model, and about the end of a text."""
    tokenizer: dict  # the content of tokenizer.json
    settings: dict  # that of tokenizer_config.json, or {}
    ends: list[int]  # the ids that end an answer: eos_token_id of generation_config.json
    chat_template: str | None = None  # in Jinja
    bos: int | None = None  # bos_token_id of config.json


def tokenizer_keys(files: TokenizerFiles, rows: int) -> dict:
    """
    The keys of GGUF about a tokenizer, with their values. rows: of the table of embeddings, which is the number of
    tokens in the file. Raises InputError for a tokenizer that llama.cpp does not have.
    """
    tokenizer = files.tokenizer
    kind = tokenizer['model'].get('type')
    if kind != 'BPE':
        raise InputError(f'the tokenizer.json is of the kind {kind}: a GGUF file can be written with a byte-level BPE, '
                         f'or with the BPE of SentencePiece')
    ids = tokenizer['model']['vocab'] | {added['content']: added['id'] for added in tokenizer['added_tokens']}
    largest = max([*ids.values(), *files.ends])
    if largest >= rows:
        raise InputError(f'the files of the tokenizer have the id {largest}, and the model only vocab_size={rows} rows')
    tokens, types = token_table(tokenizer, ids, rows)
    of_kind = sentencepiece_keys if is_sentencepiece(tokenizer) else byte_level_keys
    keys = of_kind(tokenizer, tokens) | special_ids(files, ids) | {'tokens': tokens, 'token_type': types}
    keys = {f'tokenizer.ggml.{key}': value for key, value in keys.items() if value is not None}
    return keys | ({'tokenizer.chat_template': files.chat_template} if files.chat_template else {})


def known_differences(files: TokenizerFiles) -> list[str]:
    """What llama.cpp will do differently from the files, in words."""
    words, step = [], files.tokenizer.get('pre_tokenizer') or {}
    if step.get('type') == 'Metaspace' and adds_space(files.tokenizer):
        words.append('llama.cpp puts a space before every text, also before one that begins with a space or follows a '
                     'special token')
    if len(set(files.ends)) > 3:
        words.append(f'GGUF has keys for 3 of the {len(set(files.ends))} ids that end an answer')
    return words


def is_sentencepiece(tokenizer: dict) -> bool:
    """Whether a BPE is one of characters, with tokens of bytes for those that it does not have."""
    return bool(tokenizer['model'].get('byte_fallback'))


def token_table(tokenizer: dict, ids: dict[str, int], rows: int) -> tuple[list[str], list[int]]:
    """The text and the type of each id. Ids that no token has are unused, with a name that no other token has."""
    sentencepiece, unknown = is_sentencepiece(tokenizer), tokenizer['model'].get('unk_token')
    tokens, types = [f'[PAD{i}]' for i in range(rows)], [UNUSED] * rows
    for token, i in ids.items():
        tokens[i], types[i] = token, BYTE if sentencepiece and token in BYTE_TOKENS else NORMAL
    for added in tokenizer['added_tokens']:
        i, types[added['id']] = added['id'], CONTROL if added['special'] else USER_DEFINED
        if sentencepiece and not added['special']:
            tokens[i] = added['content'].replace(SPACE, ' ')
    if sentencepiece and unknown in ids:
        types[ids[unknown]] = UNKNOWN
    return tokens, types


# ---- the two kinds ---------------------------------------------------------------------------------------------------

def byte_level_keys(tokenizer: dict, tokens: list[str]) -> dict:
    """What is special to a byte-level BPE: the name of its rule for words, and its merges. Raises InputError."""
    model, normalizer = tokenizer['model'], tokenizer.get('normalizer')
    if normalizer not in (None, {'type': 'NFC'}):
        raise InputError(f'tokenizer.json has the normalizer {normalizer}, which llama.cpp does not have')
    words = word_rule(tokenizer.get('pre_tokenizer'))
    merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['merges']]
    if not merges:  # each byte is a token, and words do not matter. llama.cpp needs a merge: this one never applies.
        absent = ''.join(tokens)
        return {'model': 'gpt2', 'pre': 'gpt-2', 'merges': [f'{absent} {absent}']}
    if words not in WORDS:
        raise InputError(f'tokenizer.json splits text into words by {" then ".join(words) or "no rule"}, which '
                         f'llama.cpp has under none of the names {", ".join(sorted(set(WORDS.values())))}')
    whole_words_first = bool(model.get('ignore_merges'))
    if whole_words_first != (WORDS[words] == 'llama-bpe'):
        raise InputError(f'tokenizer.json has ignore_merges={str(whole_words_first).lower()}, and llama.cpp the '
                         f'opposite for the rule {WORDS[words]}')
    return {'model': 'gpt2', 'pre': WORDS[words], 'merges': merges}


def word_rule(pre_tokenizer: dict | None) -> tuple[str, ...]:
    """The steps by which a pre_tokenizer splits text into words, as in WORDS. Raises InputError without bytes."""
    steps = pre_tokenizer or {'type': 'none'}
    *steps, level = steps['pretokenizers'] if steps['type'] == 'Sequence' else [steps]
    if level['type'] != 'ByteLevel' or level.get('add_prefix_space', True):
        raise InputError(f'tokenizer.json is no byte-level BPE that llama.cpp has: the pre_tokenizer ends with {level}')
    words = []
    for step in steps:
        pattern = (step.get('pattern') or {}).get('Regex')
        if step['type'] == 'Digits' and step.get('individual_digits'):
            words.append(DIGITS)
        elif step['type'] == 'Split' and pattern and step['behavior'] == 'Isolated' and not step.get('invert'):
            words.append(pattern)
        else:
            words.append(str(step))
    return (*words, GPT2) if level.get('use_regex', True) else tuple(words)


def sentencepiece_keys(tokenizer: dict, tokens: list[str]) -> dict:
    """
    What is special to the BPE of SentencePiece: a score per token, and whether a text begins with a space. Raises
    InputError.
    """
    model = tokenizer['model']
    vocab, merges = model['vocab'], [tuple(merge.split(' ') if isinstance(merge, str) else merge)
                                     for merge in model['merges']]
    if not BYTE_TOKENS <= vocab.keys():
        raise InputError('tokenizer.json has byte_fallback, but not all of the tokens <0x00> to <0xFF>, which '
                         'llama.cpp needs')
    pairs = {(token[:i], token[i:]) for token in vocab for i in range(1, len(token))
             if token[:i] in vocab and token[i:] in vocab}
    joined = [token for token, _ in groupby(left + right for left, right in merges)]
    if pairs != set(merges) or len(joined) > len(set(joined)):
        raise InputError('the merges of tokenizer.json are not those of SentencePiece: llama.cpp would join other '
                         'tokens')
    score = {token: -float(rank) for rank, token in enumerate(joined)}
    return {'model': 'llama', 'pre': 'default', 'scores': [score.get(token, 0.0) for token in tokens],
            'add_space_prefix': adds_space(tokenizer)}


def adds_space(tokenizer: dict) -> bool:
    """Whether a text begins with a space that is not in it. Raises InputError if spaces are handled differently."""
    normalizer, pre_tokenizer = tokenizer.get('normalizer'), tokenizer.get('pre_tokenizer')
    prepend = {'type': 'Prepend', 'prepend': SPACE}
    replace = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}
    steps = normalizer['normalizers'] if (normalizer or {}).get('type') == 'Sequence' else [normalizer]
    if pre_tokenizer is None and steps in ([prepend, replace], [replace]):
        return prepend in steps
    whole_text = {'type': 'Metaspace', 'replacement': SPACE, 'split': False}
    if normalizer is None and pre_tokenizer and whole_text.items() <= pre_tokenizer.items():
        return pre_tokenizer.get('prepend_scheme', 'always') != 'never'
    raise InputError(f'tokenizer.json handles spaces by normalizer={normalizer} and pre_tokenizer={pre_tokenizer}, '
                     f'which llama.cpp does not do')


# ---- special tokens --------------------------------------------------------------------------------------------------

def special_ids(files: TokenizerFiles, ids: dict[str, int]) -> dict:
    """The ids of the tokens that begin, end and pad a text, and which of them llama.cpp adds to a text by itself."""
    def named(key):
        token = files.settings.get(key)
        return ids.get(token['content'] if isinstance(token, dict) else token)
    ends, eos = files.ends, named('eos_token')
    before, after = template_ids(files.tokenizer.get('post_processor'), ids)
    eos = eos if eos is not None and (eos in ends or not ends) else next(iter(ends), None)
    others = [end for end in ends if end != eos] + [None, None]
    bos = next((i for i in (before, named('bos_token'), files.bos, eos) if i is not None), None)
    return {
        # llama.cpp takes number 1 or 11 for an id that is missing
        'bos_token_id': bos, 'eos_token_id': eos, 'eot_token_id': others[0], 'eom_token_id': others[1],
        'unknown_token_id': ids.get(files.tokenizer['model'].get('unk_token')),
        'padding_token_id': named('pad_token'),
        'add_bos_token': before is not None or bool(files.settings.get('add_bos_token')) and bos is not None,
        'add_eos_token': after is not None and after == eos,
    }


def template_ids(post_processor: dict | None, ids: dict[str, int]) -> tuple[int | None, int | None]:
    """The ids that a post_processor puts before and after a text; None: no id."""
    steps = post_processor or {'type': 'Sequence', 'processors': []}
    steps = steps['processors'] if steps['type'] == 'Sequence' else [steps]
    for step in steps:
        if step['type'] == 'TemplateProcessing':
            first, last = (ids.get(step['single'][i].get('SpecialToken', {}).get('id')) for i in (0, -1))
            return first, last
    return None, None
