"""The first samples of a labelled data set as training will see them: tokens, and the class."""

from __future__ import annotations

import numpy as np

from cache_store.errors import DataError
from workers.data.text.labelled.corpus import LabelledCorpus
from workers.data.text.labelled.rows import texts_of
from workers.data.text.labelled.tokens import PairEncoder
from workers.data.text.preview import Preview, Run, ShownSample
from workers.data.text.splits import split_documents
from workers.data.text.tokens.tokenizers import load_tokenizer
from workers.specs.language import CausalLMSpec, LabelledTextSpec


def preview_labelled(data: LabelledTextSpec, model: CausalLMSpec, seed: int, split: str, rows: int) -> Preview:
    """Read and encode the first `rows` rows of a split, as preparing the data would; the class stands behind the text,
    as what is to be told. DataError and ConfigError as `prepare_labelled`."""
    corpus, tokenizer = LabelledCorpus(data), load_tokenizer(model)
    encoder = PairEncoder(tokenizer, model)
    own, numbers = split_documents(data.as_text(), seed, corpus.documents)[split]
    wanted = np.zeros(corpus.documents[own], bool)
    wanted[numbers[:rows]] = True
    samples: list[ShownSample] = []
    problems: list[str] = []
    for _, record in corpus.records(own, wanted):
        try:
            if record.error is not None:
                raise record.error
            name = corpus.classes.names[corpus.classes.number(record)]
            whole, cut = (encoder.encode([texts_of(record)], most)[0][0] for most in (None, data.sequence_length))
        except DataError as error:
            problems.append(error.message)
            continue
        runs = (Run(tokenizer.decode(cut), tuple(cut.tolist()), False), Run(f" {name}", (), True))
        samples.append(ShownSample(f"row {record.row} of {record.file}", runs, len(whole) - len(cut)))
    return Preview(
        samples=tuple(samples), documents=len(numbers), problems=tuple(problems), findings=(), notes=corpus.notes
    )
