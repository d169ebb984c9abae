"""The materialize nodes of one regime: which sets there are, and what was decided for each boundary."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.costs import snapshot_policy
from orchestrator.costs.boundary_costs import Prediction, make_seconds
from orchestrator.costs.formulas import Estimate
from orchestrator.costs.snapshot_policy import Decision
from orchestrator.plan.boundaries import Boundaries, Hops
from orchestrator.plan.regime_state import Ended, RegimeState
from orchestrator.plan.views import stored_views
from orchestrator.regimes.stages import Stage
from workers.specs.as_json import to_json
from workers.specs.tasks import MaterializeTask, snapshot_role


class SnapshotNodes:
    """Decides which boundaries are stored when it is made, then adds a node for each set a stage asks for."""

    def __init__(self, state: RegimeState) -> None:
        """The state's costs are settled. Raises ConfigError when a regime insists on snapshots that exceed the
        budget."""
        self._state = state
        budget = state.regime.snapshots.budget
        self._share = None if budget is None else budget // state.inputs.sharing
        # In a wave, and top down, all boundaries are alive at one time, as where nothing is released.
        top_down = state.regime.row.has_base and state.regime.split.order == "top_down"
        self._together = state.regime.snapshots.retention == "keep" or bool(state.wave) or top_down
        if state.views == "auto":
            self._settle_views()
        self._decisions = self._decide(state.boundaries)
        state.stored = frozenset(hops for hops, found in self._decisions.items() if found.source == "snapshots")
        #: Most snapshot bytes alive at one time.
        self.peak_bytes = self._peak_bytes(state.boundaries, self._decisions)
        #: Version of the blocks before it, boundary, split, view -> materialize node.
        self._sets: dict[tuple[int, int, str, int | None], str] = {}
        #: Boundary -> what its tasks share; made once, since there may be thousands of views.
        self._tasks: dict[int, dict[str, Any]] = {}

    def _settle_views(self) -> None:
        """Give stored boundaries the views that the budget allows."""
        state = self._state
        least = self._decide(state.boundaries)
        state.stored_views = stored_views(
            state.boundaries.most_epochs,
            lambda views: self._peak_bytes(state.boundaries.with_views(views), least),
            self._share,
        )
        state.boundaries = state.boundaries.with_views(state.stored_views)

    def _decide(self, boundaries: Boundaries) -> dict[Hops, Decision]:
        prices = [boundaries.facts(hops, self._state.costs) for hops in boundaries.order]
        decided = snapshot_policy.decide(prices, self._state.regime.snapshots.mode, self._share, keep=self._together)
        return dict(zip(boundaries.order, decided, strict=True))

    def _peak_bytes(self, boundaries: Boundaries, decisions: Mapping[Hops, Decision]) -> int:
        """Count the most bytes alive at one time of those boundaries that are stored."""
        stored = [
            boundaries.set_bytes(hops) if decision.source == "snapshots" else 0 for hops, decision in decisions.items()
        ]
        return snapshot_policy.peak_bytes(stored, keep=self._together)

    def decision(self, stage: Stage) -> Decision:
        """Where a stage's input comes from."""
        if not stage.hops:
            return Decision("images", f"starts at the {self._state.regime.domain.raw}")
        return self._decisions[stage.hops]

    def read(self, stage: Stage, epochs: tuple[int, int] | None) -> dict[str, str]:
        """Role -> materialize node of every set that a stage, or these epochs of it, reads."""
        boundaries = self._state.boundaries
        index = boundaries.order.index(stage.hops)
        views = boundaries.views_read(stage, epochs)
        # In the order in which the first epochs will ask: view 0 first, validation at the end of the epoch.
        roles = {snapshot_role("train", views[0]): self._set_node(index, "train", views[0])}
        roles[snapshot_role("validation", None)] = self._set_node(index, "validation", None)
        for view in views[1:]:
            roles[snapshot_role("train", view)] = self._set_node(index, "train", view)
        return roles

    def predictions(self, ended: Ended) -> tuple[Prediction, ...]:
        """What was decided for each boundary, in seconds. All stages have been added."""
        return tuple(
            self._prediction(index, ended.stages, ended.rounds) for index in range(len(self._state.boundaries))
        )

    def _set_node(self, index: int, split: str, view: int | None) -> str:
        state = self._state
        known = self._sets.get((state.version, index, split, view))
        if known is not None:
            return known
        hops = state.boundaries.order[index]
        parents = {"data": state.data_node}
        parents |= {f"weights/{block}": state.weights[block] for hop in hops for block in hop}
        if self._rolled(index):
            parents["previous"] = self._set_node(index - 1, split, view)
        parents |= state.gate_parent()
        task = {
            **self._shared_task(index),
            "split": split,
            "view": view,
            **({"gate": to_json(state.gate_spec)} if state.gate is not None else {}),
        }
        which = "validation" if view is None else f"{split} view {view}"
        label = f"snapshot {hops[-1][-1]} {which}"
        if state.boundaries.moves(hops):
            label += f" round {state.version + 1}"
        node = state.add("materialize", label, task, parents, self._predicted(index, split))
        self._sets[state.version, index, split, view] = node
        return node

    def _predicted(self, index: int, split: str) -> Estimate:
        """What making a set takes."""
        state, boundaries = self._state, self._state.boundaries
        load = state.estimator.load
        hops, rolled, rows = boundaries.order[index], self._rolled(index), self._state.inputs.rows.of(split)
        spec = boundaries.specs[hops]
        predicted = state.estimator.frozen(
            [state.outline.part(block) for hop in (hops[-1:] if rolled else hops) for block in hop],
            min(spec.group_rows, rows),
            rows=rows,
            precision=spec.precision,
            stored_row_bytes=boundaries.row_bytes(hops),
            read_row_bytes=boundaries.row_bytes(hops[:-1]) if rolled else 0,
            load_row_seconds=0.0 if rolled else load.train if split == "train" else load.evaluate,
        )
        if state.costs.basis == "measured":
            return dataclasses.replace(predicted, seconds=make_seconds(state.costs, hops, rows, rolled=rolled))
        return predicted

    def _rolled(self, index: int) -> bool:
        """Whether a boundary's sets are made from those of the one before."""
        return index > 0 and self._decisions[self._state.boundaries.order[index - 1]].source == "snapshots"

    def _shared_task(self, index: int) -> dict[str, Any]:
        if index not in self._tasks:
            boundaries = self._state.boundaries
            task = MaterializeTask(
                experiment=self._state.experiment,
                boundary=boundaries.specs[boundaries.order[index]],
                split="train",
                view=0,
                frozen=self._state.frozen_beside,
            )
            self._tasks[index] = to_json(task)
        return self._tasks[index]

    def _prediction(self, index: int, stages: Sequence[str], rounds: Mapping[str, Sequence[str]]) -> Prediction:
        """`stages`: last train node of every stage, in order; `rounds`: those before it."""
        state, boundaries = self._state, self._state.boundaries
        hops = boundaries.order[index]
        costs, decision = boundaries.costs(hops, state.costs), self._decisions[hops]
        read_by = [state.views_seen(stage, decision.source) for stage in state.stages if stage.hops == hops]
        return Prediction(
            label=hops[-1][-1],
            source=decision.source,
            reason=decision.reason,
            basis=state.costs.basis,
            bytes=boundaries.rows_made(hops) * boundaries.row_bytes(hops),
            views=max((seen.views for seen in read_by if seen is not None), default=None),
            make_seconds=costs.make_from_previous if self._rolled(index) else costs.make_from_start,
            read_seconds=costs.read,
            recompute_seconds=costs.recompute,
            # A set that no version of a block sets apart is one node.
            sets=tuple(dict.fromkeys(node for (_, at, _, _), node in self._sets.items() if at == index)),
            stages=tuple(
                node
                for stage, last in zip(state.stages, stages, strict=True)
                if stage.hops == hops
                for node in (*rounds.get(last, ()), last)
            ),
        )
