"""The questions that a run trains on, as digests."""

from __future__ import annotations

import dataclasses

import numpy as np

from workers.data.text.formats import TEXT_FORMATS
from workers.data.text.splits import split_documents
from workers.overlap import TrainedQuestions, digest_questions
from workers.specs.language import TextSpec


def trained_questions(data: TextSpec, seed: int) -> TrainedQuestions | None:
    """Take the digests of the questions that are trained on; None for data that is no questions."""
    if TEXT_FORMATS[data.name].candidates == 1:
        return None
    # Examples are shown before questions, never trained on.
    corpus = TEXT_FORMATS[data.name].open(dataclasses.replace(data, shots=0))
    own, numbers = split_documents(data, seed, corpus.documents)["train"]
    wanted = np.zeros(corpus.documents[own], bool)
    wanted[numbers] = True
    return digest_questions(record.value.asked for _, record in corpus.records(own, wanted))
