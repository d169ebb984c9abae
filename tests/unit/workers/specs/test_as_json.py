"""Specs as JSON: fields that came later leave out what does not have them."""

from __future__ import annotations

from workers.specs.as_json import from_json, to_json
from workers.specs.experiment import Experiment, ImageSpec, ResNetSpec


def test_a_field_that_came_later_is_written_only_where_it_is_given_also_inside_others() -> None:
    digits = Experiment(model=ResNetSpec(name="resnet18"), data=ImageSpec(name="digits"), classes=10, seed=1)
    assert not {"build", "args", "sample", "classes"} & to_json(digits)["data"].keys()
    assert to_json(digits)["code"] is None
    own = Experiment(
        model=ResNetSpec(name="resnet18"), data=ImageSpec(name="python", sample=(3, 8, 8)), classes=10, seed=1
    )
    assert to_json(own)["data"]["sample"] == [3, 8, 8]
    assert [from_json(Experiment, to_json(each)) for each in (digits, own)] == [digits, own]
