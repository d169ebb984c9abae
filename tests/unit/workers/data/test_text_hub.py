"""Hub data sets through the `datasets` package, on folders laid out as on the hub."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from text_makers import BYTES, samples_of, source_of, store, texts, write_parquet

from cache_store.errors import ConfigError, DataError
from workers.data.text.inspect import inspect_text
from workers.data.text.prepare import prepare_text
from workers.specs.language import TextSpec

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("datasets", reason="needs the package datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_parquet(tmp_path / "set" / "train-00000-of-00001.parquet", {"text": texts(30), "id": list(range(30))})
    write_parquet(tmp_path / "set" / "test-00000-of-00001.parquet", {"text": texts(4), "id": list(range(4))})
    return tmp_path / "set"


def test_a_folder_laid_out_as_on_the_hub_is_read_with_its_own_splits(folder: Path) -> None:
    data = TextSpec(name="hub", path=str(folder), validation=3, pack=False)
    outline = inspect_text(data)
    assert outline.documents == outline.rows == {"train": 27, "validation": 3, "test": 4}
    assert outline.fingerprint == inspect_text(data).fingerprint
    snapshots = store()
    result = prepare_text(data, BYTES, 0, snapshots, fingerprint=outline.fingerprint)
    found = [bytes(ids[:-1]).decode() for ids, _, _ in samples_of(source_of(data, BYTES, "test", snapshots, 0, result))]
    assert found == texts(4)
    found = [
        bytes(ids[:-1]).decode() for ids, _, _ in samples_of(source_of(data, BYTES, "train", snapshots, 0, result))
    ]
    assert [text for text in texts(30) if text in found] == found
    assert len(found) == 27


def test_other_rows_are_another_fingerprint(folder: Path) -> None:
    data = TextSpec(name="hub", path=str(folder), validation=3)
    before = inspect_text(data).fingerprint
    write_parquet(folder / "test-00000-of-00001.parquet", {"text": texts(5), "id": list(range(5))})
    assert inspect_text(data).fingerprint != before


def test_a_hub_column_that_is_missing_is_named_with_the_nearest(folder: Path) -> None:
    with pytest.raises(DataError, match="has no 'texts'; did you mean 'text'"):
        inspect_text(TextSpec(name="hub", path=str(folder), column="texts"))


def test_a_folder_without_data_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be loaded"):
        inspect_text(TextSpec(name="hub", path=str(tmp_path / "empty")))


def test_a_hub_id_must_be_pinned() -> None:
    with pytest.raises(ConfigError, match=r"data\.revision: none given for someone/something"):
        inspect_text(TextSpec(name="hub", path="someone/something"))
    with pytest.raises(DataError, match="none given for hub"):
        inspect_text(TextSpec(name="hub"))


def test_without_the_package_the_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from cache_store.errors import ConfigError\n"
        "from workers.data.text.inspect import inspect_text; from workers.specs.language import TextSpec\n"
        f"try: inspect_text(TextSpec(name='hub', path={str(tmp_path)!r}))\n"
        "except ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "data.name: hub needs the package datasets: pip install 'segprop[lm]'" in done.stdout
