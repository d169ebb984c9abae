"""Decode a data set once into the store, as two sets (train, test) of rows (image, label).

Shards are decoded one after another, each by a pool of threads (Pillow works outside the GIL), so memory is
bounded by one shard and one row group of encoded images. Shards that are already there are not decoded again.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import PIL

from cache_store.errors import DataError
from cache_store.formats.codec import Field
from cache_store.keys import digest_json
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from workers.data.counting import ProgressCounter, ReportCount
from workers.data.images.facts import SPLITS, Split
from workers.data.images.formats.base import ImageFiles
from workers.data.images.formats.decoder import Decoder
from workers.data.images.formats.table import IMAGE_FORMATS
from workers.data.images.inspect import locate, outline_of
from workers.data.images.outline import DataOutline
from workers.data.missing import missing_shards
from workers.specs.data_results import ImageDataResult
from workers.specs.experiment import ImageSpec
from workers.specs.tasks import rows_per_shard

SHARD_BYTES = 64 << 20


def prepare(
    data: ImageSpec,
    snapshots: SnapshotStore,
    progress: ReportCount | None = None,
    fingerprint: str | None = None,
) -> ImageDataResult:
    """Decode what is not in the store yet.

    Rows are image uint8 (3, H, W) and label int64 () (samples and targets of a user's own: of their shapes and types),
    in the order of the files. Images of `folder` are turned as their EXIF data say, have their short side resized to
    `resize` (antialiased bilinear, torchvision's v2 on Pillow images) and the centre square cut out. `progress(done=,
    total=, unit="images")` counts both splits. Raises DataError: a corrupt image (file and row), an image of the wrong
    size, a label that is missing or out of range (file, row, allowed range); the files' fingerprint is not
    `fingerprint`, where one is given.
    """
    source = locate(data)
    outline = outline_of(data, source)
    if fingerprint not in (None, outline.fingerprint):
        raise DataError(f"data.path: the files of {source.root} have changed since the run was planned; run again")
    counter = ProgressCounter(progress, outline.train_rows + outline.test_rows, "images")
    sets: dict[str, str] = {}
    digests: list[str] = []
    before = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode") as pool:
        decoder = Decoder(source, outline, pool)
        for split in (split for split in SPLITS if source.rows(split)):
            target = snapshots.open(set_spec(data, source, outline, split))
            _fill(target, split, decoder, counter, before)
            before += target.spec.rows
            sets[split] = target.spec.id
            digests.append(target.digest())
    held_out = {"held_out": outline.held_out} if outline.held_out else {}
    return ImageDataResult(
        train=sets["train"],
        test=sets.get("test", sets["train"]),
        digest=digest_json(digests),
        rows={"train": outline.train_rows, "test": outline.test_rows, **held_out},
        classes=outline.classes,
        skipped=dict(outline.skipped) or None,
    )


def _fill(target: SnapshotSet, split: Split, decoder: Decoder, counter: ProgressCounter, before: int) -> None:
    """Decode the shards that are missing, until none is. `before`: rows of the splits that are complete."""
    spec = target.spec
    while missing := missing_shards(target):
        counter.done = before + spec.rows - sum(len(spec.shard_range(shard)) for shard in missing)
        for shard in missing:
            rows = spec.shard_range(shard)
            images = np.empty((len(rows), *spec.fields[0].shape), dtype=spec.fields[0].dtype)
            labels = np.empty((len(rows), *spec.fields[1].shape), dtype=spec.fields[1].dtype)
            for count in decoder.decode(split, rows, images, labels):
                counter.add(count)
            target.put(shard, (images, labels))


def set_spec(data: ImageSpec, source: ImageFiles, outline: DataOutline, split: Split) -> SetSpec:
    """Describe the set of one split: its key names everything that determines the bytes."""
    decoder: dict[str, Any] = {"format": source.format.name, "version": source.format.version}
    if source.format.pillow:
        decoder["pillow"] = PIL.__version__
    if IMAGE_FORMATS[data.name].facts.side is None:
        decoder["resize"] = outline.native[1]
    rows = source.rows(split)
    label = Field("label", outline.target.dtype, outline.target.shape)
    row_bytes = int(np.prod(outline.native)) * np.dtype(source.dtype).itemsize + label.bytes
    shard_rows = min(rows, rows_per_shard(row_bytes, SHARD_BYTES, 1))
    return SetSpec(
        key={
            "kind": "images",
            "name": data.name,
            "fingerprint": outline.fingerprint,
            "split": split,
            "decoder": decoder,
        },
        rows=rows,
        fields=(Field("image", source.dtype, outline.native), label),
        group_rows=shard_rows,
        shard_rows=shard_rows,
    )
