"""Networks that a user wrote, as a model family. Loads torch when a network is looked at, not before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from workers import user_code
from workers.models.base import Capabilities, Export, Finding, ModelFamily, Parts, Start, Traits, Written
from workers.specs.experiment import PythonSpec
from workers.specs.model import FileDigests, expect
from workers.specs.results import INITIAL_STATE

if TYPE_CHECKING:
    from cache_store.records.nodes import Attempt
    from workers.control import Control
    from workers.models.counting import Shape
    from workers.models.outline import ChainOutline

_WHERE = "model.build"


@dataclass(frozen=True)
class PythonFound:
    """Where the code of a network is, and its digest."""

    code: user_code.UserCode


class PythonFamily(ModelFamily[PythonSpec, PythonFound]):
    """See `workers.models.base.ModelFamily`."""

    name = "python"
    spec = PythonSpec
    domain = "images"
    traits = Traits(noun="a network of your own", can=Capabilities())

    def inspect(self, model: PythonSpec) -> PythonFound:
        code = user_code.find(model.build, model.path, _WHERE)
        if model.code is not None and model.code != code.digest:
            raise user_code.other_source("model.code", model.code, code)
        return PythonFound(code)

    def outline(self, model: PythonSpec, found: PythonFound | None, sample: Shape, classes: int) -> ChainOutline:
        from workers.models.python.cutting import cut

        return cut(self.architecture(model, found), sample, classes).outline

    def architecture(self, model: PythonSpec, found: PythonFound | None) -> PythonSpec:
        code = expect(PythonFound, found).code
        return replace(model, path=code.travelling(), code=code.digest)

    def start(self, model: PythonSpec, found: PythonFound | None) -> PythonSpec:
        # Where it is cut changes no weight.
        return replace(self.architecture(model, found), segments="auto")

    def file_digests(self, model: PythonSpec, found: PythonFound | None) -> FileDigests:
        return FileDigests(code=expect(PythonFound, found).code.digest)

    def fit_problems(self, model: PythonSpec, chain: ChainOutline, sample: Shape) -> Iterator[Finding]:
        (scores,) = chain.head.outputs
        if scores[0] < chain.classes:
            yield (
                ("model", "build"),
                f"the head gives {scores[0]} scores, the data have {chain.classes} classes (0 to {chain.classes - 1})",
            )

    def words(self, model: PythonSpec, found: PythonFound | None) -> str:
        return model.build

    def parts(self, model: PythonSpec, sample: Shape, classes: int) -> Parts:
        from workers.models.python.parts import PythonParts

        return PythonParts(model, sample, classes)

    def write_start(self, start: Start, attempt: Attempt, control: Control) -> Written:
        from workers import tensor_files
        from workers.models.chain import state_digest
        from workers.models.python.parts import initial_state

        state = initial_state(expect(PythonSpec, start.model), start.seed)
        attempt.write(INITIAL_STATE, tensor_files.TensorStream(state))
        return Written(digest=state_digest(state))

    def export(self, export: Export, target: Path) -> None:
        from workers.models.python.export import write_folder

        write_folder(export, expect(PythonSpec, export.model), target)


PYTHON = PythonFamily()
