"""The colours of the pages can be told from each other and from what they stand on, by day and by night."""

from __future__ import annotations

import re

import pytest

from orchestrator.reports.page_template import template
from orchestrator.ui.pages import style

#: Text and what it stands on: WCAG AA asks for 4.5.
TEXT = [
    *((ink, ground) for ink in ("ink", "muted", "link") for ground in ("bg", "panel", "soft")),
    *((f"on-{state}", state) for state in ("stored", "reused", "running", "failed", "stopped", "waiting")),
    ("on-danger", "danger"),
    ("ink", "button"),
    ("ink", "mark"),
    ("danger", "soft"),
]
#: Lines, borders of fields and the mark of the focus: WCAG AA asks for 3.
GRAPHICS = [
    *((f"c{index}", "panel") for index in range(6)),
    *((name, ground) for name in ("edge", "focus") for ground in ("panel", "bg")),
    *((f"on-{state}", "soft") for state in ("stored", "reused", "running", "stopped")),
    ("danger", "panel"),
]


def palettes() -> dict[str, dict[str, str]]:
    light, _, dark = style().partition("@media (prefers-color-scheme: dark)")
    texts = {"light": light, "dark": dark}
    found = {name: dict(re.findall(r"--([\w-]+):(#[0-9a-f]{6})", text)) for name, text in texts.items()}
    assert found["light"].keys() == found["dark"].keys()
    return found


def luminance(colour: str) -> float:
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrasts_meet_wcag_aa(scheme: str) -> None:
    palette = palettes()[scheme]
    wanted = [*((*pair, 4.5) for pair in TEXT), *((*pair, 3.0) for pair in GRAPHICS)]
    low = [
        f"{ink} on {ground}: {contrast(palette[ink], palette[ground]):.2f} < {least}"
        for ink, ground, least in wanted
        if contrast(palette[ink], palette[ground]) < least
    ]
    assert low == []


def test_the_judge_knows_black_from_white() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_reports_have_the_same_palette_by_day_and_by_night() -> None:
    light, dark = (f"--ink:{palettes()[scheme]['ink']}" for scheme in ("light", "dark"))
    sheet = template("style.css.j2").render()
    assert light in sheet
    assert dark in sheet
    assert set(re.findall(r"var\(--([\w-]+)\)", sheet)) <= {*palettes()["light"], "c"}


def test_every_colour_of_the_style_sheet_is_of_the_palette() -> None:
    sheet = style()
    own = re.sub(r"--[\w-]+:#[0-9a-f]{6}", "", sheet)
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b", own) == []
    assert set(re.findall(r"var\(--([\w-]+)\)", sheet)) <= palettes()["light"].keys()
