"""The table of model families: what it knows, what a package may add, and what is said of packages that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from installed_family import install, install_mlp, python

from cache_store.errors import ConfigError
from workers.domains.planning import AnyData
from workers.domains.registry import DOMAINS, planning_of_family
from workers.models.registry import DEFAULT, FAMILIES, family
from workers.specs.as_json import from_json, to_json
from workers.specs.experiment import Experiment, ImageSpec, ResNetSpec
from workers.specs.language import CausalLMSpec, HFTextSpec, LabelledTextSpec, TextSpec
from workers.specs.model import expect, family_name, spec_class

EXPERIMENTS = [
    Experiment(model=ResNetSpec(name="resnet18"), data=ImageSpec(name="digits"), classes=10, seed=1),
    Experiment(model=CausalLMSpec(family="causal_lm", config={}), data=TextSpec(name="stdlib"), classes=9, seed=1),
    Experiment(model=HFTextSpec(family="hf_text"), data=LabelledTextSpec(labels=("a", "b")), classes=2, seed=1),
]


def test_every_row_is_of_its_name_and_works_on_a_domain_there_is() -> None:
    for name, row in FAMILIES.items():
        assert (row.name, family_name(row.spec)) == (name, name)
        assert row.domain in DOMAINS
        assert planning_of_family(name).data in get_args(AnyData)
    assert DEFAULT in FAMILIES


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_model_is_read_back_as_the_spec_of_its_family(experiment: Experiment) -> None:
    assert from_json(Experiment, to_json(experiment)) == experiment


def test_an_unknown_family_is_refused_with_those_there_are() -> None:
    for ask in (family, spec_class):
        with pytest.raises(ConfigError) as caught:
            ask("resnets")
        assert caught.value.message == (
            "model.family: 'resnets' is not known; did you mean 'resnet'?; allowed: "
            "causal_lm, hf_image, hf_text, python, resnet, timm, torchvision, vgg, vit"
        )


def test_what_a_table_did_not_choose_is_a_defect() -> None:
    with pytest.raises(TypeError, match="expected TextSpec, got ImageSpec"):
        expect(TextSpec, ImageSpec(name="digits"))


def asked(site: Path, name: str = "mlp") -> str:
    """What is said when the family is asked for: its class, or the error."""
    code = (
        "from cache_store.errors import ConfigError\n"
        "from workers.models.registry import family\n"
        f"try: print(type(family({name!r})).__name__)\n"
        "except ConfigError as error: print(error.message)\n"
    )
    done = python(site, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_package_adds_a_family(tmp_path: Path) -> None:
    assert asked(install_mlp(tmp_path)) == "MLPFamily"
    assert "did you mean 'mlp'?; allowed: causal_lm, hf_image, hf_text, mlp, python" in asked(tmp_path, "mlq")


def test_planning_with_a_family_of_a_package_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from workers.models.registry import family; mlp = family('mlp');"
        "mlp.outline(mlp.spec(), None, (3, 8, 8), 10); print('torch' in sys.modules)"
    )
    assert python(install_mlp(tmp_path), "-c", code).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import no_such_module", "broken:FAMILY cannot be loaded: ModuleNotFoundError: No module named"),
        ("", "broken:FAMILY cannot be loaded: AttributeError"),
        ("FAMILY = 3", "broken:FAMILY is a int, not a ModelFamily"),
        (
            "from segprop_mlp.family import MLPFamily\nclass Other(MLPFamily): name = 'other'\nFAMILY = Other()",
            "broken:FAMILY is called 'other'",
        ),
        (
            "from segprop_mlp.family import MLPFamily\nfrom workers.specs.experiment import ResNetSpec\n"
            "class Other(MLPFamily): spec = ResNetSpec\nFAMILY = Other()",
            "broken:FAMILY has a spec of the family 'resnet'",
        ),
    ],
)
def test_a_package_that_is_wrong_is_named_with_what_is_wrong(tmp_path: Path, source: str, problem: str) -> None:
    install_mlp(tmp_path / "sources")
    (tmp_path / "sources" / "segprop_mlp-1.0.dist-info").rename(tmp_path / "unused")
    site = tmp_path / "sources"
    (site / "broken.py").write_text(source)
    install(site, "segprop_broken", {"mlp": "broken:FAMILY"})
    assert asked(site).startswith(f"model.family: 'mlp', added by the package segprop_broken 1.0: {problem}")


def test_two_packages_may_not_add_one_name(tmp_path: Path) -> None:
    install_mlp(tmp_path)
    install(tmp_path, "another", {"mlp": "another:FAMILY"})
    said = asked(tmp_path)
    assert "adds a family of the same name; uninstall one of them" in said
    assert "another 1.0" in said
    assert "segprop_mlp 1.0" in said
