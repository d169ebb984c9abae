"""Images as far as planning needs to know them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from workers.data.images.targets import CLASSES, TARGETS, kind_for
from workers.domains.planning import DomainPlanning, LoadSeconds, SplitRows
from workers.models.base import Finding
from workers.models.counting import Shape
from workers.specs.experiment import ImageSpec, LossSpec, TargetKind, TrainSpec
from workers.specs.language import CausalLMSpec
from workers.specs.tasks import DataTask

if TYPE_CHECKING:
    from workers.data.images.outline import DataOutline


#: Seconds in which one core makes a view: of an image, and of each of its pixels. Fitted to
#: benchmarks/results/augment.json at sides of 16 to 224: 203, 291 and 468 images a second and core at 224.
_VIEW_SECONDS = {"paper": (80e-6, 97e-9), "light": (62e-6, 67e-9), "none": (7e-6, 42.5e-9)}


class ImagePlanning(DomainPlanning[ImageSpec, "DataOutline"]):
    """See `workers.domains.planning.DomainPlanning`."""

    data = ImageSpec
    raw = "images"
    libraries = ("numpy", "pillow")
    group_rows = 256
    evaluation_batch = 512

    def metrics(self, data: ImageSpec) -> tuple[str, ...]:
        return TARGETS[data.targets or "classes"].metrics

    def targets(self, name: str, loss: str) -> TargetKind | None:
        kind = kind_for(loss) if name == "python" else "classes"
        return None if kind == "classes" else kind

    def loss_refusals(self, data: ImageSpec, train: TrainSpec) -> Iterator[Finding]:
        from workers.domains.images.objective import problems

        yield from problems(data, train)

    def loss(self, train: TrainSpec) -> LossSpec | None:
        from workers.domains.images.objective import settled

        return settled(train.loss)

    def output_problems(
        self, data: ImageSpec, outline: DataOutline, train: TrainSpec, outputs: int
    ) -> Iterator[Finding]:
        from workers.domains.images.objective import output_problems

        yield from output_problems(outline, train, outputs)

    def inspect(self, data: ImageSpec, seed: int) -> DataOutline:
        from workers.data.images.inspect import inspect

        return inspect(data)

    def foresee(self, data: ImageSpec, seed: int) -> DataOutline:
        from workers.data.images.inspect import foresee

        return foresee(data)

    def rows(self, data: ImageSpec, outline: DataOutline) -> SplitRows:
        return split_rows(data, outline.train_rows, outline.test_rows, outline.held_out)

    def problems(self, data: ImageSpec) -> Iterator[Finding]:
        if data.resize is not None and data.resize < data.image_size:
            yield ("data", "resize"), f"{data.resize}: must be at least data.image_size, which is {data.image_size}"
        for name, share in (("validation", data.validation), ("test", data.test)):
            if share >= 1 and share != int(share):
                yield ("data", name), f"{share}: must be a fraction below 1 or a whole number of samples"
        yield from _own_problems(data)
        if data.name == "digits" and data.path is not None:
            yield ("data", "path"), "digits come with scikit-learn; leave data.path out"

    def row_problems(self, data: ImageSpec, rows: SplitRows) -> Iterator[Finding]:
        if rows.validation < 1 or rows.train < 1:
            left = "validate" if rows.validation < 1 else "train"
            total = rows.train + rows.validation
            message = f"{data.validation:g}: of {total} training samples, leaves none to {left} on"
            yield ("data", "validation"), message
        if rows.test < 1:
            yield ("data", "test"), f"{data.test:g}: leaves none of the samples to test on"

    def classes(self, outline: DataOutline) -> int:
        return outline.classes

    def views(self, data: ImageSpec) -> int | Literal["auto"]:
        # Without augmentation all views are the same pixels.
        return 1 if _own(data) or (data.views == "auto" and data.augment == "none") else data.views

    def with_views(self, data: ImageSpec, views: int) -> ImageSpec:
        return replace(data, views=views)

    def sample(self, data: ImageSpec, outline: DataOutline) -> Shape:
        return outline.native if _own(data) else sample_shape(data)

    def checked_sample(self, data: ImageSpec) -> Shape | None:
        return data.sample if _own(data) else sample_shape(data)

    def load_seconds(self, data: ImageSpec) -> LoadSeconds:
        if _own(data):
            return LoadSeconds()
        return LoadSeconds(_view_seconds(data.augment, data.image_size), _view_seconds("none", data.image_size))

    def without_files(self, data: ImageSpec, outline: DataOutline) -> ImageSpec:
        alone = replace(data, path=None, download=False, targets=_stored_kind(data))
        if not _own(data):
            return alone
        return replace(alone, build=None, args=None, classes=None, augment="none", sample=outline.native)

    def task(self, data: ImageSpec, fingerprint: str, seed: int, tokenizing: CausalLMSpec | None) -> DataTask:
        # Data are decoded once for all the ways they are augmented, split and limited.
        decoded = ImageSpec(
            name=data.name,
            path=_code_folder(data) if _own(data) else data.path,
            download=data.download,
            image_size=data.image_size,
            resize=data.resize,
            views=1,
            build=data.build,
            args=data.args,
            sample=data.sample,
            classes=data.classes,
            targets=_stored_kind(data),
        )
        return DataTask(data=decoded, fingerprint=fingerprint)

    def words(self, data: ImageSpec, outline: DataOutline, count_text: Callable[[int], str]) -> str:
        from workers.data.images.outline import NOT_HERE

        rows, size = self.rows(data, outline), data.image_size
        if _own(data):
            shape = "x".join(map(str, outline.native))
            return f"{data.build}: {rows.train} + {rows.validation} + {rows.test} samples, {shape}"
        words = f"{data.name}: {rows.train} + {rows.validation} + {rows.test} images, {size}x{size}"
        words += f", views {self.views(data)}"
        if outline.fingerprint == NOT_HERE:
            words += " (not here yet: the run downloads them)"
        if not outline.skipped:
            return words
        found = ", ".join(f"{count} {suffix}" for suffix, count in outline.skipped)
        return f"{words} (skipped, no images: {found})"

    def train_sets_words(self, views: int) -> str:
        return f"{views} view{'s' if views != 1 else ''}"

    def measured(self, data: ImageSpec) -> str | None:
        kind = data.targets or "classes"
        return None if kind == "classes" else f"is for images with classes, and data.targets is {kind}"

    def export_facts(self, data: ImageSpec, outline: DataOutline) -> dict[str, Any]:
        from workers.data.images.inspect import resize_of

        if _own(data):
            taken = "floats as they are, uint8 divided by 255"
            targets = {} if outline.target == CLASSES else {"targets": outline.target.kind}
            return {"class_names": list(outline.class_names), "preprocessing": {"samples": taken}, **targets}
        return {
            "class_names": list(outline.class_names),
            "preprocessing": {
                "resize": resize_of(data),
                "center_crop": data.image_size,
                "mean": list(outline.mean),
                "std": list(outline.std),
            },
        }


def _view_seconds(augment: str, side: int) -> float:
    each, pixel = _VIEW_SECONDS[augment]
    return each + pixel * side * side


def _stored_kind(data: ImageSpec) -> TargetKind | None:
    """The kind of targets as tasks name it: classes, which is what all data sets had before there was a choice, are
    not named."""
    return None if data.targets == "classes" else data.targets


def _own(data: ImageSpec) -> bool:
    """Tell whether samples come from a function of the user's, and so are taken as they are."""
    return data.name == "python"


def _code_folder(data: ImageSpec) -> str | None:
    """The folder of a function's code, as every worker finds it."""
    from workers.user_code import find

    return find(str(data.build), data.path, "data.build").travelling()


def _own_problems(data: ImageSpec) -> Iterator[Finding]:
    """Check that keys of the user's own data are given where they count, and there alone."""
    if _own(data):
        if data.build is None:
            yield ("data", "build"), "none given for python; allowed: module:function, which returns the data sets"
        if data.download:
            yield ("data", "download"), "true: a function's data are not downloaded; allowed for: cifar10, cifar100"
        return
    for key in ("build", "args", "sample", "classes", "targets"):
        if getattr(data, key) is not None:
            yield ("data", key), f"is for data.name python; {data.name} has none"


def sample_shape(data: ImageSpec) -> Shape:
    """One sample as the network sees it: an RGB image, square, or what the user's own data are."""
    return data.sample or (3, data.image_size, data.image_size)


def split_rows(data: ImageSpec, train_rows: int, test_rows: int, held_out: int = 0) -> SplitRows:
    """Sizes of the three splits, by the rule of `workers.data.splits`: test comes off first, then validation."""
    own = train_rows - held_out
    test = test_rows or _share(data.test, own)
    own -= 0 if test_rows else test
    validation = held_out or _share(data.validation, own)
    rest = own if held_out else own - validation
    return SplitRows(min(rest, data.train_limit or rest), validation, min(test, data.test_limit or test))


def _share(setting: float, rows: int) -> int:
    return round(setting * rows) if setting < 1 else int(setting)


IMAGES = ImagePlanning()
