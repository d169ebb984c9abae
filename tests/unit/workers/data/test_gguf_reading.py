"""What the quick reader gives is what the package's own gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from workers.data.text.gguf_reading import quicken

gguf = pytest.importorskip("gguf")


def test_a_file_reads_the_same_through_plain_arrays(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_token_list(["a", "bé", "<s>"])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_tensor("x", np.arange(12, dtype=np.float32).reshape(3, 4))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()

    own = gguf.GGUFReader(file) if not hasattr(gguf.GGUFReader, "quick") else gguf.GGUFReader.__mro__[1](file)
    quicken()
    quicken()
    quick = gguf.GGUFReader(file)
    assert list(quick.fields) == list(own.fields)
    for name, field in own.fields.items():
        assert quick.fields[name].contents() == field.contents(), name
        assert [part.tolist() for part in quick.fields[name].parts] == [part.tolist() for part in field.parts]
    (mine,), (theirs,) = quick.tensors, own.tensors
    assert (mine.name, mine.shape.tolist(), mine.data_offset) == (
        theirs.name,
        theirs.shape.tolist(),
        theirs.data_offset,
    )
    assert np.array_equal(mine.data, theirs.data)
    # Read through arrays over the file itself: neither a copy nor the slow kind.
    assert type(quick.fields["GGUF.version"].parts[0]) is np.ndarray
    assert not mine.data.flags.owndata
