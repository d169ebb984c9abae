"""Some documents of a data set, tried with a tokenizer before anything starts as preparing the data would."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np

from cache_store.errors import ConfigError
from workers.data.splits import permutation
from workers.data.text.corpora.base import Corpus, Record
from workers.data.text.formats import TEXT_FORMATS
from workers.data.text.tokens.sound import encode_sound, refuse
from workers.data.text.tokens.tokenizers import load_tokenizer
from workers.specs.language import CausalLMSpec, TextSpec

#: Documents of a sample: the first ones, and those drawn by the seed from the beginning of the data.
_FIRST, _DRAWN, _WITHIN = 32, 168, 1 << 14
#: Documents tried together, and seconds after which no more are.
_TOGETHER, _SECONDS = 20, 1.0


def sample_of(corpus: Corpus, seed: int) -> tuple[Record, ...]:
    """Read the first documents of train, and some that the seed draws from those that follow."""
    count = corpus.documents["train"]
    wanted = np.zeros(count, bool)
    wanted[:_FIRST] = True
    wanted[permutation(min(count, _WITHIN), seed, "sample")[:_DRAWN]] = True
    return tuple(_read(corpus, wanted))


def _read(corpus: Corpus, wanted: np.ndarray) -> Iterator[Record]:
    """Nothing is read behind the last one."""
    yield from (record for _, record in itertools.islice(corpus.records("train", wanted), int(wanted.sum())))


def try_sample(data: TextSpec, model: CausalLMSpec, sample: tuple[Record, ...]) -> None:
    """Encode a sample for about a second. DataError, naming several documents, for those that preparing the data would
    refuse; nothing where `data.bad` skips them, or where there is no tokenizer yet, which is said elsewhere."""
    if data.bad == "skip" or not sample:
        return
    try:
        encoder = TEXT_FORMATS[data.name].encoder(load_tokenizer(model), data)
    except ConfigError:
        return
    faults = []
    end = time.monotonic() + _SECONDS
    for first in range(0, len(sample), _TOGETHER):
        faults += encode_sound(sample[first : first + _TOGETHER], lambda some: encoder(some, False)).faults
        if time.monotonic() > end:
            break
    refuse(faults)
