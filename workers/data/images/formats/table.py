"""The formats of image data, by the name that a configuration gives as `data.name`: a row each."""

from __future__ import annotations

from workers.data.images import facts
from workers.data.images.formats.base import DataFormat
from workers.data.images.formats.cifar import Cifar, Pickles
from workers.data.images.formats.class_folders import ClassFolders
from workers.data.images.formats.digits import Digits
from workers.data.images.formats.python_samples import PYTHON_SAMPLES

IMAGE_FORMATS: dict[str, DataFormat] = {
    "digits": Digits(),
    "cifar10": Cifar(
        facts.CIFAR10,
        labels=("label",),
        pickles=Pickles(
            folder="cifar-10-batches-py",
            files={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
            label="labels",
            dataset="CIFAR10",
        ),
    ),
    "cifar100": Cifar(
        facts.CIFAR100,
        labels=("fine_label", "label"),
        pickles=Pickles(
            folder="cifar-100-python",
            files={"train": ("train",), "test": ("test",)},
            label="fine_labels",
            dataset="CIFAR100",
        ),
    ),
    "folder": ClassFolders(),
    "python": PYTHON_SAMPLES,
}
