"""Pickles of data sets are read by a machine that calls nothing and believes no size."""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from workers.data.images.formats.plain_pickle import PickledArray, read_plain_pickle

BATCH = {"data": np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072), "labels": [3, 7], "b": "x"}


@pytest.mark.parametrize("protocol", range(5))
def test_a_batch_is_read_as_pickle_reads_it(protocol: int) -> None:
    found = read_plain_pickle(pickle.dumps(BATCH, protocol))
    assert np.array_equal(found.pop("data").array(), BATCH["data"])
    assert found == {"labels": [3, 7], "b": "x"}


@pytest.mark.parametrize("dtype", ["<u2", ">i4", "<i8", "|i1"])
def test_arrays_of_whole_numbers_keep_type_and_order(dtype: str) -> None:
    given = np.asfortranarray(np.arange(12, dtype=dtype).reshape(3, 4))
    found = read_plain_pickle(pickle.dumps(given, 2))
    assert isinstance(found, PickledArray)
    assert found.array().dtype == given.dtype
    assert np.array_equal(found.array(), given)


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.how = function, arguments

    def __reduce__(self) -> Any:
        return self.how


HOSTILE = {
    "calls a program": pickle.dumps(Calls(eval, "1 / 0")),
    "calls numpy for a terabyte": pickle.dumps(Calls(np.ndarray, (1 << 40,))),
    "names a class": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "a key as deep as the C stack": b"\x80\x04})" + b"\x85" * 300_000 + b"K\x01s.",
    "bytes that are not there": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a number that is not there": b"\x80\x04\x8b\xff\xff\xff\x7f.",
    "recalls what was never there": b"\x80\x04h\x05.",
    "appends to nothing": b"\x80\x04a.",
    "appends to itself what is no list": b"\x80\x04K\x01K\x01a.",
    "a persistent name": b"\x80\x04Pabc\n.",
    "an extension": b"\x80\x04\x82\x01.",
    "text that is none": b"\x80\x04X\x01\x00\x00\x00\xff.",
    "nothing": b"",
    "half of a batch": pickle.dumps(BATCH, 2)[:900],
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        read_plain_pickle(content)


def test_arrays_that_lie_about_their_bytes_are_refused() -> None:
    ends = pickle.dumps(np.zeros(4, np.uint8), 2).replace(b"K\x04\x85", b"K\x05\x85")
    with pytest.raises(ValueError, match="has 4 bytes"):
        read_plain_pickle(ends).array()
    for other in (np.zeros(3), np.array([None]), np.zeros(2, [("a", "u1")])):
        with pytest.raises(ValueError, match=r"whole numbers|damaged"):
            read_plain_pickle(pickle.dumps(other, 2)).array()


def test_a_place_in_the_memo_costs_no_memory() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "from workers.data.images.formats.plain_pickle import read_plain_pickle\n"
        r"print(read_plain_pickle(b'\x80\x04]r\xff\xff\xff\xff.'))"
    )
    assert resource.getrlimit(resource.RLIMIT_AS)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
