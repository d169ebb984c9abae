"""Prefetching: order, bounds, errors and a clean stop."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cache_store.errors import CorruptShard
from workers.training.prefetch import prefetch


def prefetching() -> int:
    return sum(1 for thread in threading.enumerate() if thread.name == "prefetch")


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert eventually(lambda: prefetching() == 0)


@pytest.mark.parametrize("depth", [1, 2, 100])
def test_items_arrive_in_order_and_end(depth: int) -> None:
    items = prefetch(iter(range(50)), depth)
    assert list(items) == list(range(50))
    assert list(items) == []


def test_at_most_depth_items_wait() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    with prefetch(source(), 3) as items:
        assert next(items) == 0
        assert eventually(lambda: len(made) == 5)  # one taken, three waiting, one at the door
        time.sleep(0.05)
        assert len(made) == 5


def test_items_are_made_in_another_thread_ahead_of_the_consumer() -> None:
    main = threading.get_ident()

    def source() -> Iterator[int]:
        for _ in range(3):
            yield threading.get_ident()

    assert main not in set(prefetch(source(), 2))


def test_an_error_arrives_after_the_items_before_it_as_the_same_object() -> None:
    error = CorruptShard("damaged", shard=3)

    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise error

    items = prefetch(source(), 5)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(CorruptShard) as raised:
        next(items)
    assert raised.value is error
    assert list(items) == []


def test_an_iterable_that_cannot_be_iterated_fails_in_the_consumer() -> None:
    with pytest.raises(TypeError):
        next(prefetch(3, 1))  # type: ignore[call-overload, arg-type]


def test_leaving_early_stops_the_thread_and_closes_the_source() -> None:
    closed: list[bool] = []

    def source() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            closed.append(True)

    with prefetch(source(), 2) as items:
        assert next(items) == 0
    assert prefetching() == 0
    assert closed == [True]
    assert list(items) == []
    items.close()


def test_a_consumer_that_fails_stops_the_thread() -> None:
    def consume() -> None:
        with prefetch(iter(range(10**9)), 2) as items:
            for _ in items:
                raise RuntimeError("step failed")

    with pytest.raises(RuntimeError, match="step failed"):
        consume()
    assert prefetching() == 0


def test_a_forgotten_prefetch_stops_its_thread() -> None:
    items = prefetch(iter(range(10**9)), 2)
    next(items)
    del items
    gc.collect()
    assert eventually(lambda: prefetching() == 0)


def test_close_waits_for_the_item_being_made_only() -> None:
    started = threading.Event()

    def source() -> Iterator[int]:
        while True:
            started.set()
            time.sleep(0.1)
            yield 1

    items = prefetch(source(), 4)
    assert started.wait(5)
    begin = time.monotonic()
    items.close()
    assert time.monotonic() - begin < 2
    assert prefetching() == 0


def test_a_consumer_waiting_when_another_thread_closes_gets_the_end() -> None:
    release = threading.Event()

    def source() -> Iterator[int]:
        release.wait(5)
        yield 1

    items = prefetch(source(), 1)
    ended: list[list[int]] = []
    consumer = threading.Thread(target=lambda: ended.append(list(items)))
    consumer.start()
    time.sleep(0.02)
    items._channel.stop()
    consumer.join(5)
    assert ended == [[]]
    release.set()
    items.close()


@pytest.mark.parametrize("depth", [0, -1])
def test_a_depth_below_one_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        prefetch([], depth)
