"""Write a trained network of a user's as a folder: weights, the source it is built by, and a file that loads both."""

from __future__ import annotations

from pathlib import Path

from cache_store.storage.durable import write_atomically
from workers import user_code
from workers.models.base import Export
from workers.models.torchvision_folder import write_folder as write_weights
from workers.specs.experiment import PythonSpec

_LOADING = '''"""Rebuild this network from the source beside this file: `model = load()`."""

import importlib
import sys
from pathlib import Path

from safetensors.torch import load_file

#: Modules in `code`, which are read from there whatever else is called so.
MODULES = {modules!r}


def load():
    here = Path(__file__).resolve().parent
    held = {{name: sys.modules.pop(name) for name in MODULES if name in sys.modules}}
    sys.path.insert(0, str(here / "code"))
    try:
        model = importlib.import_module({module!r}).{function}(**{args!r})
    finally:
        sys.path.remove(str(here / "code"))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(held)
    model.load_state_dict(load_file(here / "model.safetensors"), strict=True)
    return model.eval()
'''


def write_folder(export: Export, model: PythonSpec, target: Path) -> None:
    """Write `code/`, and what `workers.models.torchvision_folder.write_folder` writes."""
    code = user_code.find(model.build, model.path, "model.build")
    if code.digest != model.code:
        raise user_code.other_source("model.build", str(model.code), code)
    files = () if code.installed else code.files
    for name in files:
        write_atomically(target / "code" / name, (code.root / name).read_bytes())
    loading = _LOADING.format(
        modules=sorted(filter(None, map(user_code.module_name, files))),
        module=code.module,
        function=code.function,
        args=model.args,
    )
    write_weights(export, model, model.build, loading, target)
