"""Images as far as planning needs to know them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workers.domains.planning import DomainPlanning, SplitRows
from workers.models.base import Finding
from workers.models.counting import Shape
from workers.specs.experiment import ImageSpec
from workers.specs.language import CausalLMSpec
from workers.specs.tasks import DataTask

if TYPE_CHECKING:
    from workers.data.images.outline import DataOutline


class ImagePlanning(DomainPlanning[ImageSpec, "DataOutline"]):
    """See `workers.domains.planning.DomainPlanning`."""

    data = ImageSpec
    raw = "images"
    libraries = ("numpy", "pillow")
    group_rows = 256
    evaluation_batch = 512
    metrics = ("accuracy", "loss")

    def inspect(self, data: ImageSpec, seed: int) -> DataOutline:
        from workers.data.images.inspect import inspect

        return inspect(data)

    def rows(self, data: ImageSpec, outline: DataOutline) -> SplitRows:
        return split_rows(data, outline.train_rows, outline.test_rows)

    def problems(self, data: ImageSpec) -> Iterator[Finding]:
        if data.resize is not None and data.resize < data.image_size:
            yield ("data", "resize"), f"{data.resize}: must be at least data.image_size, which is {data.image_size}"
        if data.validation >= 1 and data.validation != int(data.validation):
            message = f"{data.validation}: must be a fraction below 1 or a whole number of samples"
            yield ("data", "validation"), message
        if data.name == "digits" and data.path is not None:
            yield ("data", "path"), "digits come with scikit-learn; leave data.path out"

    def row_problems(self, data: ImageSpec, rows: SplitRows) -> Iterator[Finding]:
        if rows.validation < 1 or rows.train < 1:
            left = "validate" if rows.validation < 1 else "train"
            total = rows.train + rows.validation
            message = f"{data.validation:g}: of {total} training samples, leaves none to {left} on"
            yield ("data", "validation"), message

    def classes(self, outline: DataOutline) -> int:
        return outline.classes

    def views(self, data: ImageSpec) -> int:
        return data.views

    def sample(self, data: ImageSpec, outline: DataOutline) -> Shape:
        return sample_shape(data)

    def checked_sample(self, data: ImageSpec) -> Shape:
        return sample_shape(data)

    def without_files(self, data: ImageSpec) -> ImageSpec:
        return replace(data, path=None, download=False)

    def task(self, data: ImageSpec, fingerprint: str, seed: int, tokenizing: CausalLMSpec | None) -> DataTask:
        # Data are decoded once for all the ways they are augmented, split and limited.
        decoded = ImageSpec(
            name=data.name, path=data.path, download=data.download, image_size=data.image_size, resize=data.resize
        )
        return DataTask(data=decoded, fingerprint=fingerprint)

    def words(self, data: ImageSpec, outline: DataOutline, count_text: Callable[[int], str]) -> str:
        rows, size = self.rows(data, outline), data.image_size
        return f"{data.name}: {rows.train} + {rows.validation} + {rows.test} images, {size}x{size}, views {data.views}"

    def train_sets_words(self, views: int) -> str:
        return f"{views} view{'s' if views != 1 else ''}"

    def export_facts(self, data: ImageSpec, outline: DataOutline) -> dict[str, Any]:
        from workers.data.images.inspect import resize_of

        return {
            "class_names": list(outline.class_names),
            "preprocessing": {
                "resize": resize_of(data),
                "center_crop": data.image_size,
                "mean": list(outline.mean),
                "std": list(outline.std),
            },
        }


def sample_shape(data: ImageSpec) -> Shape:
    """One image as the network sees it: RGB, square."""
    return (3, data.image_size, data.image_size)


def split_rows(data: ImageSpec, train_rows: int, test_rows: int) -> SplitRows:
    """Sizes of the three splits, by the rule of `workers.data.splits`: validation comes off first."""
    validation = round(data.validation * train_rows) if data.validation < 1 else int(data.validation)
    rest = train_rows - validation
    return SplitRows(min(rest, data.train_limit or rest), validation, min(test_rows, data.test_limit or test_rows))


IMAGES = ImagePlanning()
