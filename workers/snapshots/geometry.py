"""Where samples lie in a snapshot set: groups computed together, and the shards that hold whole groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache_store.formats.codec import VERSION, Field
from cache_store.snapshots.spec import SetSpec
from workers.specs.tasks import rows_per_shard


@dataclass(frozen=True, eq=False)
class Geometry:
    """Samples in data set order, `group` of them computed together.

    Images: a sample is a row. Text: a sample is one row a token, and `offsets` (int64, samples + 1) says where each
    begins; shards are then of different lengths. Bytes, not rows, decide where a shard ends, so that one rule gives
    the geometry of every boundary of a chain.
    """

    samples: int
    group: int
    #: First group of every shard, and the number of groups at the end.
    shard_groups: np.ndarray
    offsets: np.ndarray | None
    shard_rows: int

    @classmethod
    def of(cls, samples: int, offsets: np.ndarray | None, *, group: int, row_bytes: int, shard_bytes: int) -> Geometry:
        groups = -(-samples // group)
        if offsets is None:
            shard_rows = rows_per_shard(row_bytes, shard_bytes, group)
            cuts = np.arange(0, groups, shard_rows // group)
            return cls(samples, group, np.append(cuts, groups), None, shard_rows)
        ends = offsets[np.minimum(np.arange(1, groups + 1) * group, samples)]
        limit = max(1, shard_bytes // row_bytes)
        starts = [0]
        while starts[-1] < groups:
            first_row = offsets[starts[-1] * group]
            # The groups that fit, at least one.
            fits = int(np.searchsorted(ends, first_row + limit, side="right"))
            starts.append(max(starts[-1] + 1, fits))
        return cls(samples, group, np.asarray(starts), offsets, 0)

    def set_spec(self, key: Mapping[str, Any], fields: tuple[Field, ...], codec_version: int = VERSION) -> SetSpec:
        if self.offsets is None:
            return SetSpec(key, self.samples, fields, self.group, self.shard_rows, codec_version=codec_version)
        cuts = self.offsets[np.minimum(self.shard_groups * self.group, self.samples)]
        grouped = {**key, "group_samples": self.group}
        return SetSpec.ragged(grouped, fields, 1, cuts.tolist(), codec_version)

    @property
    def shard_samples(self) -> np.ndarray:
        """Samples of each shard, int64."""
        return np.diff(np.minimum(self.shard_groups * self.group, self.samples))

    def shards_of(self, samples: np.ndarray) -> np.ndarray:
        """The shard that holds each of these samples: int64."""
        return np.searchsorted(self.shard_groups, samples // self.group, side="right") - 1

    def groups_of_shard(self, shard: int) -> range:
        return range(int(self.shard_groups[shard]), int(self.shard_groups[shard + 1]))

    def shard_of_group(self, group: int) -> int:
        return int(np.searchsorted(self.shard_groups, group, side="right")) - 1

    def samples_of_group(self, group: int) -> range:
        return range(group * self.group, min(self.samples, (group + 1) * self.group))

    def rows_of_group(self, group: int) -> range:
        samples = self.samples_of_group(group)
        if self.offsets is None:
            return samples
        return range(int(self.offsets[samples.start]), int(self.offsets[samples.stop]))
