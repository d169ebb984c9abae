"""What a task reports while it works."""

from __future__ import annotations

from workers.control import NOTHING, ThreadControl, Update


def test_an_update_is_written_with_what_is_known_and_read_again() -> None:
    update = Update(phase="train", epoch=1, epochs=3, loss=0.0, hits=0, unit="images")
    assert update.to_json() == {"phase": "train", "epoch": 1, "epochs": 3, "loss": 0.0, "hits": 0, "unit": "images"}
    assert Update.from_json({**update.to_json(), "of a later version": 1}) == update


def test_a_control_keeps_the_latest_update_and_nothing_before_the_first() -> None:
    control = ThreadControl()
    assert control.latest() == NOTHING
    assert NOTHING.to_json() == {}
    control.progress(Update(done=1))
    control.progress(Update(done=2, total=3))
    assert control.latest() == Update(done=2, total=3)
