"""Define the colours, sizes and SVG output that all figures share."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from orchestrator.reports.records import RegimeSummary
from orchestrator.reports.words import of_kind

INK, MUTED, GRID, PANEL = "#1c2733", "#66727f", "#e3e8ed", "#f6f8fa"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "segprop",
    "path.simplify": False,
    "text.parse_math": False,
    "font.size": 10.5,
    "axes.edgecolor": "#b8c2cc",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "hatch.linewidth": 1.2,
    "hatch.color": "white",
}


def colours(regimes: Mapping[str, RegimeSummary]) -> dict[str, str]:
    """Choose a colour for every regime: the hue says the kind, regimes of one kind get shades of it."""
    seen: dict[str, int] = {}
    out: dict[str, str] = {}
    for name, regime in regimes.items():
        shades = of_kind(regime.kind).shades
        index = seen.get(regime.kind, 0)
        seen[regime.kind] = index + 1
        out[name] = shades[index % len(shades)]
    return out


def slug(text: str) -> str:
    """Return `text` as part of an SVG id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("+", " plus")).strip("-") or "x"


def spacious() -> ConstrainedLayoutEngine:
    """Return a layout with room between panels."""
    return ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.06)


def svg(figure: Figure, name: str, label: str) -> str:
    """Return the figure as an element for a page; `name` goes into its ids, `label` is for those who cannot see it."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sid="([^"]+)"', rf' id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r"font: ([^;\"]*?)('[^;\"]*|[\w-]+)(?=[;\"])", _font, text)
    opening = re.compile(r"<svg\b[^>]*>")
    [viewbox] = re.findall(r'viewBox="([^"]+)"', text)[:1]
    head = (
        f'<svg class="figure" role="img" aria-label="{label}" viewBox="{viewbox}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return opening.sub(lambda _: head, text, count=1)


def _font(match: re.Match[str]) -> str:
    """Put the page's own font in place of the one matplotlib measured with."""
    return f"font: {match.group(1)}system-ui, sans-serif"
