"""Which epoch is the best, and when a stage stops, whatever it is scored by."""

from __future__ import annotations

import pytest

from workers.specs.experiment import ExitSpec, TrainSpec
from workers.specs.results import EpochFigures
from workers.training.stopping import exit_reason, is_better


def epochs(metric: str, *values: tuple[float, float]) -> list[EpochFigures]:
    """Epochs with (value of the metric, loss)."""
    return [
        EpochFigures(
            epoch=index,
            train_loss=loss,
            train_accuracy=None,
            validation_loss=loss,
            validation_accuracy=value if metric == "accuracy" else None,
            validation={"loss": loss, metric: value},
            lr=0.1,
            seconds=1.0,
        )
        for index, (value, loss) in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("metric", "values", "better"),
    [
        ("r2", [(0.2, 5.0), (0.3, 9.0)], True),
        ("r2", [(-0.2, 5.0), (-0.3, 1.0)], False),
        ("f1_micro", [(0.5, 2.0), (0.5, 1.0)], True),
        ("rmse", [(0.2, 1.0), (0.3, 1.0)], False),
        ("rmse", [(0.3, 1.0), (0.2, 1.0)], True),
        ("loss", [(2.0, 2.0), (1.0, 1.0)], True),
        ("loss", [(1.0, 1.0), (1.0, 1.0)], False),
    ],
)
def test_a_later_epoch_is_the_best_where_its_metric_is(
    metric: str, values: list[tuple[float, float]], better: bool
) -> None:
    assert is_better(epochs(metric, *values), 0, metric) is better


def test_a_plateau_and_a_target_go_by_the_score() -> None:
    history = epochs("r2", (0.1, 1.0), (0.5, 0.9), (0.4, 0.1), (0.45, 0.05))
    plateau = TrainSpec(epochs=9, exit=ExitSpec(plateau=2))
    assert exit_reason(plateau, history, 4, 99, "r2") == "plateau"
    assert exit_reason(plateau, history[:3], 4, 99, "r2") is None
    assert exit_reason(TrainSpec(epochs=9, exit=ExitSpec(target=0.5)), history[:2], 2, 99, "r2") == "target"


def test_epochs_of_older_programs_keep_their_accuracy_as_the_score() -> None:
    written = epochs("accuracy", (0.5, 1.0))[0].to_json()
    older = EpochFigures.from_json({key: value for key, value in written.items() if key != "validation"})
    assert older.validation_of("accuracy") == 0.5
    with pytest.raises(KeyError):
        older.validation_of("r2")
