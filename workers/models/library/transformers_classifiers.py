"""Classifiers of transformers: architecture from a config.json, weights from safetensors, no code of others."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cache_store.errors import ConfigError
from cache_store.storage.durable import write_atomically
from cache_store.suggest import did_you_mean
from workers.file_digests import contents_digest
from workers.models.base import Export
from workers.models.library.networks import Library
from workers.models.python.building import seeded
from workers.models.python.tracing import single_input
from workers.models.torchvision_folder import write_folder
from workers.specs.experiment import HFImageSpec
from workers.specs.language import HFTextSpec

#: What depends on the data, and what names the program that wrote a file.
_NOT_ARCHITECTURE = ("id2label", "label2id", "num_labels", "transformers_version", "_name_or_path", "architectures")
_SHOWN = 6


SpecT = TypeVar("SpecT", HFImageSpec, HFTextSpec)


@dataclass(frozen=True)
class Kind:
    """A kind of classifier of transformers. `auto`: its class that loads one; `models`: the table of its model types,
    in `transformers.models.auto.modeling_auto`; `noun`: as messages call one."""

    auto: str
    models: str
    noun: str

    def factory(self) -> Any:
        """transformers' class that builds and loads one."""
        import transformers

        return getattr(transformers, self.auto)

    def known(self) -> tuple[str, ...]:
        """The model types that there are of this kind."""
        from transformers.models.auto import modeling_auto

        return tuple(getattr(modeling_auto, self.models))


IMAGES = Kind("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "image classifier")


def with_architecture(model: SpecT, kind: Kind = IMAGES, folder: str | None = None) -> SpecT:
    """The spec with its whole architecture as `config`. ConfigError where there is none, or it names code of others.

    folder: where `path` lies on this machine, where that is something else than a folder."""
    values = {**_config_file(folder or model.path), **(model.config or {})}
    if not values:
        raise _refuse("config", "neither model.path nor model.config is given; one of them names the architecture")
    for key, value in _everything(values):
        if key == "auto_map" or (key.endswith("_implementation") and "/" in str(value)):
            raise _refuse("config", f"{key}: names code that comes with a checkpoint, which is not run")
    return replace(model, config=_whole(values, kind))


def weights_digest(model: HFImageSpec) -> str | None:
    """Identity of the weights in `model.path`; None where there are none. ConfigError when they cannot be read."""
    if model.path is None:
        return None
    files = [(path.name, path) for path in Path(model.path).glob("*.safetensors")]
    try:
        return contents_digest(files) if files else None
    except OSError as error:
        raise _refuse("path", f"{model.path}: {error.strerror or error}") from error


class Transformers(Library):
    """One network; `model.config` is its whole architecture."""

    where = "model.config"
    kind = IMAGES
    loading: str

    def __init__(self, model: HFImageSpec) -> None:
        super().__init__(replace(model, path=None), model.segments)
        self._take(with_architecture(model).config or {}, model.path)
        self.loading = _LOADING

    def _take(self, config: dict[str, Any], path: str | None) -> None:
        """`config`: the whole architecture; `path`: the folder of the weights, None for random ones."""
        self.config, self.path, self.words = config, path, str(config["model_type"])

    def build(self, classes: int) -> nn.Module:
        network: nn.Module = self.kind.factory().from_config(self._config(classes))
        return network.float()

    def with_one_input(self, network: nn.Module) -> nn.Module:
        kind = type(network)

        def forward(self: nn.Module, x: Tensor) -> Any:
            return kind.forward(self, pixel_values=x).logits

        return single_input(network, forward)

    def initial_state(self, classes: int, seed: int) -> dict[str, Tensor]:
        if self.path is None:
            return dict(self.built(classes, seed).state_dict())
        with seeded(seed), _quiet():
            try:
                network, said = self.kind.factory().from_pretrained(
                    self.path,
                    config=self._config(classes),
                    dtype=torch.float32,
                    ignore_mismatched_sizes=True,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
            except (OSError, RuntimeError, ValueError) as error:
                raise _refuse("path", f"{self.path} cannot be loaded: {str(error).splitlines()[0]}") from error
        self._check(said, self.may_lack(classes))
        return dict(network.state_dict())

    def may_lack(self, classes: int) -> list[str]:
        """Names of the tensors that a checkpoint may lack, or have of other classes: they stay random."""
        return self.classifier(classes)

    def export(self, export: Export, target: Path) -> None:
        """As `save_pretrained` writes it, and beside it facts and a file that loads it."""
        network = self.built(export.classes, 0)
        network.load_state_dict({name: t for _, part in export.states for name, t in part.items()}, strict=True)
        names = list(export.data.get("class_names", ())) or [str(index) for index in range(export.classes)]
        config: Any = network.config
        config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
        with tempfile.TemporaryDirectory(dir=target.parent if target.parent.is_dir() else None) as folder:
            with _quiet():
                network.save_pretrained(folder)  # type: ignore[operator]
            written = [path for path in Path(folder).iterdir() if path.name != "model.safetensors"]
            # A network in several files is loaded by its index.
            for path in sorted(written, key=lambda one: one.suffix == ".json"):
                target.mkdir(parents=True, exist_ok=True)
                if path.suffix == ".safetensors":
                    shutil.move(path, target / path.name)
                else:
                    write_atomically(target / path.name, path.read_bytes())
            states = iter([("", dict(network.state_dict()))])
            write_folder(replace(export, states=states), export.model, self.words, self.loading, target)  # type: ignore[arg-type]

    def _config(self, classes: int) -> Any:
        from transformers import AutoConfig

        values = {key: value for key, value in self.config.items() if key != "model_type"}
        config = AutoConfig.for_model(self.config["model_type"], **values, num_labels=classes)
        # Of several classes of one kind transformers takes the first; it looks for their names without asking if any.
        config.architectures = config.architectures or []
        return config

    def _check(self, said: Mapping[str, Any], may_lack: list[str]) -> None:
        """Nothing else may be missing from a checkpoint, or of other classes."""
        mismatched = [entry[0] if isinstance(entry, tuple | list) else entry for entry in said["mismatched_keys"]]
        wrong = sorted({*said["missing_keys"], *mismatched} - {*may_lack})
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise _refuse("path", f"{self.path} lacks weights of {self.words}: {', '.join(wrong[:_SHOWN])}{more}")


_LOADING = '''"""Load this model with transformers alone: `model = load()` gives scores for images (B, 3, H, W)."""

from pathlib import Path

from transformers import AutoModelForImageClassification


def load():
    model = AutoModelForImageClassification.from_pretrained(Path(__file__).parent).eval()
    model.register_forward_hook(lambda module, given, output: output.logits)
    return model
'''


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own bars from the screen; what they count takes no time."""
    from transformers.utils import logging as reporting

    logging: Any = reporting
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _config_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    file = Path(path) / "config.json"
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise _refuse("path", f"{path} is no folder with a config.json") from error
    except (OSError, ValueError) as error:
        raise _refuse("path", f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise _refuse("path", f"{file} holds a {type(values).__name__}, not an object")
    return values


def _whole(values: Mapping[str, Any], of: Kind) -> dict[str, Any]:
    """The architecture with every default written out. ConfigError where transformers refuses it."""
    from transformers import CONFIG_MAPPING, AutoConfig

    kind, known = values.get("model_type"), of.known()
    if not isinstance(kind, str) or kind not in known or kind not in CONFIG_MAPPING:
        close = did_you_mean(str(kind), sorted(known))
        raise _refuse("config", f"model_type {kind!r}: transformers has no {of.noun} of that kind{close}")
    given = {key: value for key, value in values.items() if key not in ("model_type", *_NOT_ARCHITECTURE)}
    try:
        whole = AutoConfig.for_model(kind, **given).to_dict()
    except Exception as error:  # whatever transformers raises at settings it does not take
        raise _refuse("config", f"{kind}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
    return {key: value for key, value in json.loads(json.dumps(whole)).items() if key not in _NOT_ARCHITECTURE}


def _everything(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _everything(value)


def _refuse(key: str, message: str) -> ConfigError:
    return ConfigError(f"model.{key}: {message}", where=f"model.{key}")
