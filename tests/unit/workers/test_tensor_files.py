"""Files of tensors: the same bytes in every process, and those that the library would write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from workers import tensor_files

KINDS = tuple(tensor_files._NAMES)


def given() -> dict[str, torch.Tensor]:
    """A tensor of every dtype, in an order of its own, and strange names and shapes."""
    bits = torch.arange(32, dtype=torch.uint8)
    kinds = [kind for kind in reversed(KINDS) if kind is not torch.bool]
    return {
        **{f"part/{kind}": bits.clone().view(kind) for kind in kinds},
        "flags": torch.tensor([True, False]),
        'ä"\n': torch.zeros(0, 3),
        "scalar": torch.tensor(1.5),
        "b": torch.arange(6.0).view(2, 3),
    }


def written(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    stream = tensor_files.TensorStream(tensors, metadata)
    data = b"".join(stream.pieces())
    assert stream.nbytes == len(data)
    return data


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_the_library(metadata: dict[str, str] | None) -> None:
    assert written(given(), metadata) == save(given(), metadata)


def test_tensors_of_any_layout_come_back() -> None:
    tensors = {
        "turned": torch.arange(6.0).view(2, 3).t(),
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    found = load(written(tensors))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_a_file_is_the_same_however_its_tensors_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        **given(),
        "turned": torch.randn(70, 30).t(),
        "last": torch.randn(12, 8, 3, 3).to(memory_format=torch.channels_last),
        "one row": torch.randn(1, 40, 9).transpose(1, 2),
        "every other": torch.arange(100.0)[::2],
    }
    expected = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    assert written(tensors) == expected
    for size in (8, 100, 1000):
        monkeypatch.setattr(tensor_files, "PIECE_BYTES", size)
        assert written(tensors) == expected
        # A row of what is not contiguous is never cut.
        assert max(len(piece) for piece in list(tensor_files.TensorStream(tensors).pieces())[1:]) <= max(size, 40 * 36)


def test_contiguous_tensors_are_written_without_a_copy() -> None:
    tensor = torch.zeros(1000)
    _, piece = tensor_files.TensorStream({"a": tensor}).pieces()
    tensor.fill_(1.0)
    assert bytes(piece) == torch.ones(1000).numpy().tobytes()


def test_what_was_written_is_read_from_memory() -> None:
    data = np.frombuffer(bytearray(written(given(), {"format": "pt"})), np.uint8)
    found, expected = tensor_files.parse(data), given()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert written({"a": found[name]}) == written({"a": tensor}), name


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensor_files.write(path, given())
    broken = given() | {"b": torch.zeros(2, 3, device="meta")}
    with pytest.raises((RuntimeError, NotImplementedError)):
        tensor_files.write(path, broken)
    assert path.read_bytes() == save(given())
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_the_format_does_not_know_is_named() -> None:
    with pytest.raises(ValueError, match=r"odd: torch\.complex128"):
        tensor_files.TensorStream({"odd": torch.zeros(2, dtype=torch.complex128)})


EXPORT = """
import sys
from pathlib import Path
from cache_store.records.nodes import NodeStore
from cache_store.storage.open import open_storage
from workers import tensor_files
from workers.export import Trained, export
from workers.models.chain import state_digest
from workers.models.resnet.parts import initial_state, part_names
from workers.specs.experiment import Experiment, ImageSpec, ResNetSpec

folder = Path(sys.argv[1])
model = ResNetSpec(name="resnet18", stem="small", classifier="linear")
experiment = Experiment(model=model, data=ImageSpec(name="digits", image_size=16), classes=10, seed=0)
nodes = NodeStore(open_storage(str(folder / "store")))
state = initial_state(model, 10, 0)
attempt = nodes.attempt("0" * 32)
attempt.write("state.safetensors", tensor_files.TensorStream(state))
where = {"host": "", "pid": 0, "device": "cpu", "threads": 1, "started": 0.0, "finished": 0.0}
commit = attempt.commit({"digest": state_digest(state), "seconds": 0.0, "where": where})
parts = {name: commit for name in part_names(model, 16, 10)}
# The library's order of metadata is drawn anew for every file.
for turn in range(6):
    export(Trained(experiment, parts, lambda: commit), nodes, folder / str(turn))
"""


def test_two_processes_export_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", EXPORT, str(folder)], check=True, env=environment, timeout=120)
        for turn in range(6):
            found.append({path.name: path.read_bytes() for path in (folder / str(turn)).iterdir()})
    assert set(found[0]) == {"model.safetensors", "model.json", "load_model.py", "segprop_export.json"}
    assert all(files == found[0] for files in found)
