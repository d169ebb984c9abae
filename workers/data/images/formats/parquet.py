"""Images in Parquet files as on the Hugging Face hub."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from cache_store.errors import DataError
from workers.data.images.facts import Split
from workers.data.images.formats.decoder import _Decoder, _overlaps, _Piece


class _Parquet(_Decoder):
    def pieces(self, split: Split, rows: range) -> Iterator[_Piece]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        image_column, label_column = self.source.columns
        files = self.source.files[split]
        for start, stop, index in _overlaps([file.rows for file in files], rows):
            path = files[index].path
            try:
                with self.source.filesystem.open(path, "rb") as stream:
                    parquet = pq.ParquetFile(stream)
                    lengths = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
                    for low, high, group in _overlaps(lengths, range(start, stop)):
                        table = parquet.read_row_group(group, columns=[image_column, label_column])
                        table = table.slice(low, high - low)
                        yield _Piece(
                            path,
                            sum(lengths[:group]) + low,
                            table.column(image_column),
                            table.column(label_column).to_pylist(),
                        )
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"data.path: {path} cannot be read: {error}") from error

    def image(self, item: Any) -> np.ndarray:
        value = item.as_py()
        encoded = value.get("bytes") if isinstance(value, dict) else value
        if not encoded:
            raise ValueError("the column holds no bytes")
        with Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
