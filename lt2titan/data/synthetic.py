"""A seeded random language, for golden tests and benchmarks: token ids without text or tokenizer."""

from __future__ import annotations

import numpy as np

from lt2titan.data.errors import DataError
from lt2titan.data.shuffle import random_words

N_DOCUMENTS = 4096
N_SUCCESSORS = 8
MIN_LENGTH, MAX_LENGTH = 64, 512


def generate(vocab_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An order-1 Markov chain over ``vocab_size`` tokens: from each token one of 8 successors, equally
    likely.

    Its entropy is at most 3 bits per token, so a model that learns the chain falls from log(vocab_size) to
    2.08 nats. The result is a pure function of the arguments, the same for every numpy version.

    Returns:
        tokens (n_tokens,) uint32 and offsets (n_documents + 1,) int64; about 1.2 million tokens.
    """
    if vocab_size < 2:
        raise DataError(f"synthetic: a vocabulary of {vocab_size} tokens is too small; it needs at least 2")
    words = random_words(vocab_size * N_SUCCESSORS, "successors", vocab_size, seed)
    successors = (words % np.uint64(vocab_size)).astype(np.uint32).reshape(vocab_size, N_SUCCESSORS)
    span = np.uint64(MAX_LENGTH - MIN_LENGTH + 1)
    lengths = MIN_LENGTH + (random_words(N_DOCUMENTS, "lengths", seed) % span).astype(np.int64)
    choices = random_words(N_DOCUMENTS * MAX_LENGTH, "choices", seed) % np.uint64(N_SUCCESSORS)
    choices = choices.astype(np.uint8).reshape(MAX_LENGTH, N_DOCUMENTS)
    chains = np.empty((MAX_LENGTH, N_DOCUMENTS), np.uint32)
    chains[0] = random_words(N_DOCUMENTS, "starts", seed) % np.uint64(vocab_size)
    for t in range(1, MAX_LENGTH):
        chains[t] = successors[chains[t - 1], choices[t]]
    inside = np.arange(MAX_LENGTH) < lengths[:, None]
    return chains.T[inside], np.concatenate([[0], np.cumsum(lengths)])
