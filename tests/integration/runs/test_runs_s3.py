"""A whole run with its store on a real S3 server: killed, resumed, damaged, repaired, and equal to one on a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from object_stores import S3Server
from running import ROOT, Lab, final_digests, summary_of, write_config

from cache_store.storage.base import Storage
from cache_store.storage.open import open_storage
from orchestrator.runs.prepare import prepare

CHANGES = {
    "training.epochs": 2,
    "training.checkpoint_every_s": 0.001,
    "snapshots.mode": "always",
    "snapshots.retention": "keep",
}


def segprop(*arguments: str, **more: str) -> tuple[int, str]:
    process = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    return process.returncode, process.stdout


def flip(storage: Storage, path: str) -> None:
    data = bytearray(storage.read(path))
    data[len(data) // 2] ^= 1
    storage.write(path, data)


@pytest.mark.timeout(900)
def test_a_run_on_s3_killed_resumed_damaged_and_repaired_ends_as_one_on_a_folder(s3: S3Server, tmp_path: Path) -> None:
    reference = Lab.make(tmp_path / "reference", CHANGES)
    reference.run_all(("data", "model", "train", "materialize"))
    expected = final_digests(reference.prepared)

    uri = s3.address()
    config = write_config(tmp_path, {**CHANGES, "store": uri})
    marker = tmp_path / "killed"
    code, output = segprop("run", str(config), "--quiet", SEGPROP_CRASH=f"checkpoint.committed:3:{marker}")
    assert code == -signal.SIGKILL, output
    code, output = segprop("run", str(config), "--quiet")
    assert code == 0, output
    prepared = prepare(config)
    assert final_digests(prepared, uri) == expected
    assert summary_of(tmp_path / "run")["status"] == "done"

    # Damage: a shard of a kept set, and the weights of the first stage.
    storage = open_storage(uri)
    shard = next(info.path for info in storage.files("sets") if "/shards/" in info.path)
    base = prepared.plan.regimes["segprop"].stages[0]
    weights = next(info.path for info in storage.files(f"nodes/{base}/attempts"))
    flip(storage, shard)
    flip(storage, weights)
    code, output = segprop("cache", "verify", uri)
    assert (code, output.count("damaged: ")) == (1, 2), output
    code, output = segprop("cache", "verify", str(tmp_path / "run"), "--repair")
    assert code == 0, output
    code, output = segprop("run", str(config), "--quiet")
    assert code == 0, output
    assert final_digests(prepared, uri) == expected
    code, output = segprop("cache", "verify", uri)
    assert code == 0, output

    # Nothing is left to collect but what the kill and the repair left behind.
    code, output = segprop("cache", "gc", uri, "--older-than", "0s")
    assert code == 0, output
    assert segprop("cache", "verify", uri)[0] == 0
    assert not [info for info in storage.files("") if "/quarantine/" in info.path]
    assert final_digests(prepared, uri) == expected
