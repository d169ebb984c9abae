"""Class folders as people have them: links, leftovers, deep and turned pixels, splits of their own or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from data_makers import encode, plain_classes
from PIL import Image, ImageOps, features

from cache_store.errors import ConfigError, DataError
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from workers.data import splits
from workers.data.images.formats import class_folders
from workers.data.images.formats.pixels import upright_rgb
from workers.data.images.inspect import inspect, locate
from workers.data.images.prepare import prepare, set_spec
from workers.data.images.source import ImageSource
from workers.domains.images.planning import IMAGES, split_rows
from workers.specs.experiment import Experiment, ImageSpec, ResNetSpec


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, twelve images each to train on and six to test on."""
    plain_classes(tmp_path / "set", {"train": 12, "test": 6})
    return tmp_path / "set"


def spec_of(root: Path, **changes: Any) -> ImageSpec:
    return ImageSpec(name="folder", path=str(root), image_size=24, resize=24, augment="none", **changes)


def decoded(root: Path, name: str) -> np.ndarray:
    """The one training image of that file name as it is stored: uint8 (3, 24, 24)."""
    source = locate(spec_of(root))
    (item,) = [file for file in source.files["train"] if file.path.endswith(f"/{name}")]
    return source.format.image(source, item, 24)


RAMP = np.linspace(0, 65535, 24 * 24).reshape(24, 24)
DEEP = {
    "ramp16.png": RAMP.astype(np.uint16),
    "ramp16.tif": RAMP.astype(np.uint16),
    "ramp32.tif": RAMP.astype(np.int32),
    "ramp_float.tif": (RAMP / 65535).astype(np.float32),
    "ramp16.pgm": RAMP.astype(np.uint16),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_pixels_are_scaled_by_the_range_of_their_type(root: Path, name: str) -> None:
    Image.fromarray(DEEP[name]).save(root / "train/cat" / name)
    found = decoded(root, name).astype(float)
    assert np.abs(found - RAMP / 257).max() <= 0.51
    assert found.mean() == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full((24, 24), 70_000, np.int32), "values of 70000 to 70000; allowed: 0 to 65535"),
        (np.full((24, 24), -1, np.int32), "values of -1 to -1; allowed: 0 to 65535"),
        (np.full((24, 24), 200, np.int32), "whether 8 bits or 16 are meant is open"),
        (np.full((24, 24), 200, np.float32), "values of 200 to 200; allowed: 0 to 1"),
        (np.full((24, 24), np.nan, np.float32), "values of nan to nan; allowed: 0 to 1"),
    ],
)
def test_deep_pixels_whose_range_is_not_known_are_refused_by_name(
    root: Path, values: np.ndarray, expected: str
) -> None:
    Image.fromarray(values).save(root / "train/dog/odd.tif")
    with pytest.raises(DataError, match=f"train/dog/odd.tif: .*{expected}"):
        decoded(root, "odd.tif")


def test_pixels_of_8_bits_stay_as_they_are(root: Path) -> None:
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK"):
        image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)).convert(mode)
        assert np.array_equal(upright_rgb(image), image.convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_an_image_is_turned_as_its_exif_data_say(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored = np.zeros((20, 30, 3), dtype=np.uint8)
    stored[:10, :, 0], stored[:, :8, 2] = 255, 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / f"turned.{suffix}", exif=exif)
    with Image.open(tmp_path / f"turned.{suffix}") as image, Image.open(tmp_path / f"turned.{suffix}") as other:
        other.load()
        assert np.array_equal(upright_rgb(image), ImageOps.exif_transpose(other).convert("RGB"))
        assert upright_rgb(image).size == ((30, 20) if orientation < 5 else (20, 30))


def test_a_picture_stored_lying_is_decoded_upright(root: Path) -> None:
    tall = np.zeros((24, 24, 3), dtype=np.uint8)
    tall[:12, :, 0], tall[12:, :, 2] = 255, 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(tall, 1).copy()).save(root / "train/cat/turned.jpg", exif=exif, quality=95)
    found = decoded(root, "turned.jpg").astype(int)
    assert found[0, :10].min() > 200 > 50 > found[2, :10].max()
    assert found[2, 14:].min() > 200 > 50 > found[0, 14:].max()


def test_damaged_exif_data_do_not_hide_a_sound_image(root: Path) -> None:
    image = np.full((24, 24, 3), 90, dtype=np.uint8)
    Image.fromarray(image).save(root / "train/cat/odd.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f", quality=95)
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        found = decoded(root, "odd.jpg").astype(int)
    assert np.abs(found - 90).max() <= 2


def test_linked_classes_and_files_count(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "bird").symlink_to("cat", target_is_directory=True)
    (root / "train/cat/linked.png").symlink_to("0.png")
    source = locate(spec_of(root))
    assert source.class_names == ("bird", "cat", "dog")
    assert np.bincount([file.label for file in source.files["train"]]).tolist() == [13, 13, 12]
    assert np.array_equal(decoded(root, "train/cat/linked.png"), decoded(root, "train/cat/0.png"))


def test_every_dangling_link_is_named_at_once(root: Path) -> None:
    (root / "train/cat/gone.png").symlink_to("nowhere.png")
    (root / "test/dog/lost.png").symlink_to("nowhere.png")
    (root / "train/cat/.#lock.png").symlink_to("somebody@somewhere")  # hidden: an editor's lock
    with pytest.raises(DataError) as caught:
        inspect(spec_of(root))
    problems = caught.value.details["problems"]
    assert [f"{root}/train/cat/gone.png leads nowhere" in problems[0], "test/dog/lost.png" in problems[1]] == [True] * 2
    assert len(problems) == 2
    assert caught.value.exit_code == 2


def test_a_dangling_class_and_a_link_that_leads_back_are_named(root: Path) -> None:
    (root / "train/bird").symlink_to("nowhere")
    with pytest.raises(DataError, match="train/bird leads nowhere"):
        inspect(spec_of(root))
    (root / "train/bird").unlink()
    (root / "train/cat/again").symlink_to("..", target_is_directory=True)
    with pytest.raises(DataError, match=r"cat/again/cat leads back to .*/train/cat"):
        inspect(spec_of(root))


def test_hidden_folders_are_left_out_and_other_files_counted_by_suffix(root: Path) -> None:
    plain_classes(root / "train/cat", {"": 2}, (".ipynb_checkpoints",))
    plain_classes(root / "train", {"": 2}, (".cache",))
    for name in ("train/cat/Thumbs.db", "train/.DS_Store", "train/dog/notes.TXT", "test/dog/more.txt", "test/cat/LIST"):
        (root / name).write_bytes(b"\0" * 64)
    Image.new("RGB", (24, 24)).save(root / "train/cat/moving.gif")
    outline = inspect(spec_of(root))
    assert (outline.class_names, outline.train_rows, outline.test_rows) == (("cat", "dog"), 25, 12)
    assert outline.skipped == ((".db", 1), (".txt", 2), ("no suffix", 1))
    prepared = prepare(spec_of(root), SnapshotStore(open_storage(str(root.parent / "store"))))
    assert prepared.skipped == {".db": 1, ".txt": 2, "no suffix": 1}
    assert "(skipped, no images: 1 .db, 2 .txt, 1 no suffix" in IMAGES.words(spec_of(root), outline, str)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "avif"])
def test_the_first_frame_of_an_animation_is_the_image(root: Path, suffix: str) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow does not read AVIF")
    frames = [Image.new("RGB", (24, 24), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    frames[0].save(root / f"train/cat/moving.{suffix}", save_all=True, append_images=frames[1:])
    found = decoded(root, f"moving.{suffix}").astype(int)
    assert found[0].min() > 230 > 30 > found[1:].max()


def test_a_suffix_that_pillow_cannot_open_here_is_counted_as_skipped(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_folders, "IMAGE_SUFFIXES", (*class_folders.IMAGE_SUFFIXES, ".heicx"))
    class_folders.readable_suffixes.cache_clear()
    (root / "train/cat/phone.heicx").write_bytes(b"\0" * 64)
    try:
        assert inspect(spec_of(root)).skipped == ((".heicx", 1),)
    finally:
        class_folders.readable_suffixes.cache_clear()


def test_a_folder_that_is_not_split_is_split_by_the_seed(tmp_path: Path) -> None:
    plain_classes(tmp_path / "set", {"": 40})
    data = spec_of(tmp_path / "set", test=0.25)
    outline = inspect(data)
    assert (outline.classes, outline.train_rows, outline.test_rows) == (2, 80, 0)
    assert IMAGES.rows(data, outline) == split_rows(data, 80, 0)
    snapshots = SnapshotStore(open_storage(str(tmp_path / "store")))
    result = prepare(data, snapshots)
    seen: dict[int, set[bytes]] = {}
    for seed in (1, 2):
        experiment = Experiment(model=ResNetSpec(name="resnet18", stem="small"), data=data, classes=2, seed=seed)
        parts = {}
        for split in ("train", "validation", "test"):
            source = ImageSource(experiment, result, snapshots, split)
            parts[split] = {image.numpy().tobytes() for image in source.batch(np.arange(source.rows), None)}
        assert {split: len(images) for split, images in parts.items()} == {"train": 54, "validation": 6, "test": 20}
        assert len(set.union(*parts.values())) == 80
        seen[seed] = parts["test"]
    assert seen[1] != seen[2]


@pytest.mark.parametrize("changes", [{}, {"test": 7.0, "validation": 5.0}, {"test_limit": 3}, {"train_limit": 9}])
@pytest.mark.parametrize(("test_rows", "held_out"), [(0, 0), (20, 0), (20, 30)])
def test_planned_sizes_are_those_of_the_chosen_rows(changes: dict[str, Any], test_rows: int, held_out: int) -> None:
    data = ImageSpec(name="folder", **changes)
    chosen = splits.rows(data, 3, 101, test_rows, held_out)
    assert {name: len(found) for name, found in chosen.items()} == vars(split_rows(data, 101, test_rows, held_out))
    of_train = [chosen["train"], chosen["validation"], *([] if test_rows else [chosen["test"]])]
    together = np.concatenate(of_train)
    assert len(set(together.tolist())) == len(together)


@pytest.mark.parametrize(("test", "expected"), [(0.001, "none to test"), (0.999, "none to train"), (2.5, "whole")])
def test_a_test_share_that_leaves_nothing_is_refused(test: float, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"data.test: .*{expected}"):
        splits.rows(ImageSpec(name="folder", test=test), 0, 100, 0)


def test_val_beside_test_is_the_validation_split(root: Path, tmp_path: Path) -> None:
    plain_classes(root, {"val": 5})
    data = spec_of(root)
    outline = inspect(data)
    assert vars(IMAGES.rows(data, outline)) == {"train": 24, "validation": 10, "test": 12}
    snapshots = SnapshotStore(open_storage(str(tmp_path / "store")))
    result = prepare(data, snapshots)
    experiment = Experiment(model=ResNetSpec(name="resnet18", stem="small"), data=data, classes=2, seed=3)
    for split, folder in (("train", "train"), ("validation", "val"), ("test", "test")):
        source = ImageSource(experiment, result, snapshots, split)
        stored = source._set.gather(source._samples).numpy()
        files = sorted((root / folder).glob("*/*.png"))
        assert stored.tobytes() == b"".join(np.asarray(Image.open(f)).transpose(2, 0, 1).tobytes() for f in files)
        assert source.labels.tolist() == [int(f.parent.name == "dog") for f in files]


def test_a_class_of_val_that_train_lacks_is_named(root: Path) -> None:
    plain_classes(root, {"val": 2}, ("cat", "fish"))
    with pytest.raises(DataError, match="/val that train/ does not have: fish; allowed: cat, dog"):
        inspect(spec_of(root))


def test_one_broken_image_is_named_when_it_is_met(root: Path, tmp_path: Path) -> None:
    whole = (root / "train/cat/0.png").read_bytes()
    (root / "train/cat/cut.png").write_bytes(whole[:200])
    assert inspect(spec_of(root)).train_rows == 25
    with pytest.raises(DataError, match=r"train/cat/cut\.png: the image cannot be decoded"):
        prepare(spec_of(root), SnapshotStore(open_storage(str(tmp_path / "store"))))


def test_the_rules_of_decoding_are_part_of_the_identity_of_a_decoded_folder(root: Path) -> None:
    source = locate(spec_of(root))
    spec = set_spec(spec_of(root), source, inspect(spec_of(root)), "train")
    assert spec.key["decoder"]["version"] == 2
    before = source.fingerprint()
    assert before != _fingerprint_of_version(source, 3)


def _fingerprint_of_version(source: Any, version: int) -> str:
    raised = type("Raised", (type(source.format),), {"version": version})
    return type(source)(raised(), source.root, source.filesystem, source.files, source.class_names).fingerprint()


def test_class_folders_are_read_from_other_file_systems() -> None:
    memory = fsspec.filesystem("memory")
    image = encode(np.zeros((24, 24, 3), dtype=np.uint8))
    for split in ("train", "test"):
        for name in ("a/0.png", "a/deeper/1.png", "b/.hidden/2.png", "b/3.png", "b/4.txt"):
            memory.pipe(f"/class-folders/{split}/{name}", image)
    outline = inspect(ImageSpec(name="folder", path="memory://class-folders"))
    assert (outline.class_names, outline.train_rows, outline.skipped) == (("a", "b"), 3, ((".txt", 2),))


def test_one_class_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "only" / name)
    with pytest.raises(DataError, match="has one class alone, only: there is nothing to tell it from"):
        inspect(ImageSpec(name="folder", path=str(tmp_path), image_size=8))
