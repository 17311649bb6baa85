"""
Documents in blocks: read, shuffled, and encoded on all cores.

A block has about 32M characters. Each block is shuffled by itself, so that memory does not grow with the text. The next
block is read and encoded while one is being written.
"""

import collections
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from configurator import InputError
from sologpt.tokens.readers import document_parts
from sologpt.tokens.sources import Source
from sologpt.tokens.splits import FirstTokens, SomeDocuments, digest
from sologpt.tokens.tokenizer import Tokenizer

BLOCK = 2 ** 25  # characters that are shuffled together
PER_DOCUMENT = 100  # characters that each document counts in addition: what Python needs to hold it
TASK = 2 ** 16  # characters that a thread encodes at a time

Encoded = tuple[str, int, np.ndarray]  # the split, the digest of the text, and its ids


def encode_blocks(source: Source, tokenizer: Tokenizer, split: FirstTokens | SomeDocuments, dtype: np.dtype, seed: int,
                  number: int) -> Iterator[tuple[list[Future], list]]:
    """
    Yield (futures, position) for each block of a source, from its position on.

    futures: their results are lists of Encoded, in the order in which they are to be written. position: where the
    source is after the block. number: that of the first block; with the seed it decides the order within a block.
    Close the generator to stop its threads.
    """
    pool, ahead = ThreadPoolExecutor(n_cores()), collections.deque()
    try:
        for block, position in _read_blocks(source):
            if split.shuffle:
                block = [block[i] for i in np.random.default_rng((seed, number)).permutation(len(block))]
            futures = [pool.submit(encode_documents, task, tokenizer, split, dtype) for task in _tasks_of(block)]
            ahead.append((futures, position))
            number += 1
            if len(ahead) > 1:
                yield ahead.popleft()
        while ahead:
            yield ahead.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def encode_documents(documents: list[str], tokenizer: Tokenizer, split: FirstTokens | SomeDocuments,
                     dtype: np.dtype) -> list[Encoded]:
    """The parts of some documents, each with its split, its digest and its ids, an array of `dtype`."""
    encoded = []
    for document in documents:
        for name, part in split.divide(document):
            ids = tokenizer.encode_ordinary(part)
            if len(ids) and ids.max() >= tokenizer.vocab_size:
                raise InputError(f'the tokenizer gave the id {ids.max()}, but has only {tokenizer.vocab_size:,} ids')
            encoded.append((name, digest(part), ids.astype(dtype)))
    return encoded


def n_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def _read_blocks(source):
    """Yield (documents, where the source is after them), block by block."""
    documents = iter(source)
    while block := _next_block(documents):
        yield block, source.where()


def _next_block(documents: Iterable[str]) -> list[str]:
    """The next documents of an iterator, until they have BLOCK characters."""
    block, size = [], 0
    for document in documents:
        for part in document_parts(document):
            block.append(part)
            size += len(part) + PER_DOCUMENT
        if size >= BLOCK:
            break
    return block


def _tasks_of(block):
    """The documents of a block in groups of about TASK characters."""
    group, size = [], 0
    for document in block:
        group.append(document)
        size += len(document)
        if size >= TASK:
            yield group
            group, size = [], 0
    if group:
        yield group
