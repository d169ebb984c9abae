"""Code of a user's: where it is looked for, what identifies it, and that other source is never taken for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cache_store.errors import ConfigError
from workers import user_code

HERE = "model.build"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_its_identity_covers_what_it_imports_below_its_folder_and_nothing_else(tmp_path: Path) -> None:
    files = {
        "nets_a.py": "def build():\n    from helpers_a import blocks\n    import math\n    return blocks.make()",
        "helpers_a/__init__.py": "",
        "helpers_a/blocks.py": "from . import sizes\ndef make(): return sizes.WIDTH",
        "helpers_a/sizes.py": "WIDTH = 3",
        "other.py": "WIDTH = 5",
    }
    found = user_code.find("nets_a:build", str(write(tmp_path, files)), HERE)
    assert found.files == ("helpers_a/__init__.py", "helpers_a/blocks.py", "helpers_a/sizes.py", "nets_a.py")
    (tmp_path / "other.py").write_text("WIDTH = 6")
    assert user_code.find("nets_a:build", str(tmp_path), HERE).digest == found.digest
    (tmp_path / "helpers_a" / "sizes.py").write_text("WIDTH = 4")
    assert user_code.find("nets_a:build", str(tmp_path), HERE).digest != found.digest


def test_source_that_changed_is_imported_anew_and_modules_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, value in ((one, 1), (two, 2)):
        write(
            folder,
            {"nets_b.py": "from inner_b import VALUE\ndef build(): return VALUE", "inner_b.py": f"VALUE = {value}"},
        )

    def built(folder: Path) -> object:
        return user_code.call(user_code.find("nets_b:build", str(folder), HERE), None, HERE)

    assert [built(one), built(two), built(one)] == [1, 2, 1]
    (one / "inner_b.py").write_text("VALUE = 33")
    assert built(one) == 33


def test_the_given_folder_comes_before_the_current_one_and_that_before_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "given", {"nets_c.py": "def build(): return 'given'"})
    write(tmp_path / "here", {"nets_c.py": "def build(): return 'here'", "colorsys.py": "def build(): return 'own'"})
    monkeypatch.chdir(tmp_path / "here")
    assert user_code.find("nets_c:build", str(tmp_path / "given"), HERE).root == tmp_path / "given"
    assert user_code.find("nets_c:build", None, HERE).root == Path()
    assert user_code.find("nets_c:build", str(tmp_path), HERE).travelling() == str(tmp_path / "here")
    assert user_code.find("colorsys:build", None, HERE).installed is False
    monkeypatch.chdir(tmp_path)
    assert user_code.find("annotated_types:Gt", None, HERE).installed is True


def test_functions_of_the_standard_library_are_not_for_configurations() -> None:
    for build in ("os:system", "subprocess:run", "colorsys:rgb_to_hsv"):
        with pytest.raises(ConfigError, match="nor is it an installed package"):
            user_code.find(build, None, HERE)


def test_in_the_copy_of_a_submitted_job_code_is_named_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = write(tmp_path / f"{user_code.PACKAGE}1234", {"configs/nets_d.py": "def build(): return 1"})
    monkeypatch.chdir(copy)
    assert user_code.find("nets_d:build", str(copy / "configs"), HERE).travelling() == "configs"


@pytest.mark.parametrize(
    ("build", "source", "message"),
    [
        ("nets_e.build", "", "'nets_e.build': must have the form module:function"),
        ("nets_ee:build", "", "there is no module 'nets_ee' in {folder}"),
        ("nets_e:build", "def builds(): pass", "nets_e has no function 'build'; did you mean 'builds'?"),
        ("nets_e:build", "import no_such_thing", "nets_e cannot be imported: ModuleNotFoundError: No module named"),
        ("nets_e:build", "def build(: pass", "nets_e.py: cannot be read as Python"),
        (
            "nets_e:build",
            "def build():\n    raise KeyError('width')",
            "nets_e:build failed: KeyError: 'width' (nets_e.py, line 2)",
        ),
    ],
)
def test_what_is_wrong_with_it_is_named(tmp_path: Path, build: str, source: str, message: str) -> None:
    write(tmp_path, {"nets_e.py": source})
    with pytest.raises(ConfigError) as caught:
        user_code.call(user_code.find(build, str(tmp_path), HERE), None, HERE)
    assert message.format(folder=os.fspath(tmp_path)) in caught.value.message
    assert caught.value.details["where"] == HERE


def test_a_name_that_is_close_is_suggested(tmp_path: Path) -> None:
    write(tmp_path, {"mynets.py": "def build(): pass"})
    with pytest.raises(ConfigError, match="did you mean 'mynets'"):
        user_code.find("mynet:build", str(tmp_path), HERE)
