"""Data of our own: a CSV file of images and their classes."""

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

HERE = Path(__file__).parent


class CsvImages:
    """The rows of a CSV file (image, class, split) that are of one split, in order."""

    def __init__(self, file: Path, split: str) -> None:
        with file.open(newline="") as stream:
            self.rows = [row for row in csv.DictReader(stream) if row["split"] == split]
        self.folder = file.parent

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        with Image.open(self.folder / row["image"]) as image:
            pixels = np.array(image.convert("L"))
        return torch.from_numpy(pixels)[None], int(row["class"])


def splits(csv_file: str = "images.csv") -> dict[str, CsvImages]:
    """Return the data sets. A relative `csv_file` lies beside this file."""
    return {split: CsvImages(HERE / csv_file, split) for split in ("train", "test")}
