"""Write scikit-learn's digits as image files and a CSV file that lists them: `python make_images.py`."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

HERE = Path(__file__).parent


def make(folder: Path = HERE, limit: int | None = None) -> Path:
    """Write `images/` and `images.csv` into `folder`; every fifth image is for the test split."""
    digits = load_digits()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (pixels, label) in enumerate(zip(digits.images[:limit], digits.target[:limit], strict=True)):
        name = f"images/{number:04}.png"
        image = Image.fromarray(np.uint8(pixels * 255 / 16))
        image.resize((16, 16), Image.Resampling.BILINEAR).save(folder / name)
        rows.append({"image": name, "class": int(label), "split": "test" if number % 5 == 0 else "train"})
    with (folder / "images.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["image", "class", "split"])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "images.csv"


if __name__ == "__main__":
    print(make())
