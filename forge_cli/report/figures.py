"""Figures as plain data for plotly.js; a colour is the name of a CSS variable, so that figures follow the theme."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from forge_cli.redaction import printable
from forge_cli.report.series import Series, as_number, read_groups, read_marks, read_series
from forge_cli.units import GIB, MIB

COLOURS = tuple(f"var(--c{number})" for number in range(1, 7))
_FEW_POINTS = 40
_MOST_MARKS = 300
_REWARDS = (("chosen", "better answer"), ("rejected", "worse answer"), ("margins", "margin"))


class Figure(NamedTuple):
    """One plot.

    Attributes:
        title: What it shows, with its unit.
        text: What to know beside it, one sentence; may be empty.
        traces: Traces of plotly.js.
        layout: Changes to the layout that all plots share.
        is_wide: Takes the whole width of the page.
        section: Heading of the section that it stands in.
    """

    title: str
    text: str
    traces: list[dict]
    layout: dict
    is_wide: bool = False
    section: str = "Curves"


def draw_run(report: Mapping, records: Sequence[Mapping]) -> list[Figure]:
    """Draws everything that a run measured; what it did not measure has no figure."""
    figures = [
        _draw_loss(report, records),
        _draw_measure(records, "learning_rate", "Learning rate", smooth=False),
        _draw_measure(records, "grad_norm", "Gradient norm, before clipping"),
        _draw_groups(records),
        _draw_measure(records, "tokens_per_second", "Throughput, real tokens per second"),
        _draw_memory(report),
        _draw_rewards(records),
        _draw_accuracy(records),
    ]
    return [figure for figure in figures if figure]


def draw_lengths(report: Mapping) -> Figure | None:
    """Draws how long rows are, for each split as a share of its rows."""
    data = report.get("data") or {}
    traces = []
    for place, split in enumerate(data.get("splits", ())):
        bars = split.get("histogram") or []
        total = sum(count for _, count in bars)
        if total:
            shares = [round(100 * count / total, 3) for _, count in bars]
            bar = {"type": "bar", "x": [end for end, _ in bars], "y": shares, "name": _safe(split.get("name"))}
            bar["hovertemplate"] = "up to %{x} tokens: %{y:.1f} % of rows"
            traces.append({**bar, "marker": {"color": COLOURS[place % len(COLOURS)]}, "opacity": 0.75})
    layout = {"barmode": "overlay", "xaxis": {"title": {"text": "tokens"}}, "yaxis": {"ticksuffix": " %"}}
    text = "Share of rows by tokens, before cutting."
    return Figure("Row length", text, traces, layout, is_wide=True, section="Data") if traces else None


def draw_overlaid(runs: Mapping[str, Sequence[Mapping]]) -> list[Figure]:
    """Draws the curves of several runs over each other, one colour a run.

    Args:
        runs: Name of a run to its lines of ``metrics.jsonl``.
    """
    measures = (
        ("loss", "Training loss, smoothed", True),
        ("eval_loss", "Held-out loss", False),
        ("eval_ema_loss", "Held-out loss, EMA weights", False),
        ("grad_norm", "Gradient norm, smoothed", True),
        ("learning_rate", "Learning rate", False),
        ("tokens_per_second", "Real tokens per second, smoothed", True),
        ("eval_rewards/margins", "Held-out reward margin", False),
    )
    figures = []
    for measure, title, is_smooth in measures:
        traces = []
        for place, (name, records) in enumerate(runs.items()):
            if series := read_series(records, measure):
                series = series.smooth() if is_smooth else series
                dash = ("solid", "dot", "dash")[place // len(COLOURS) % 3]
                traces.append(_line(series, name, place, dash=dash, points="eval" in measure))
        if traces:
            figures.append(Figure(title, "", traces, {}, is_wide=measure == "loss"))
    return figures


def _safe(text: object, most: int = 120) -> str:
    """Makes a name of the run fit for labels, where plotly.js reads some tags of HTML."""
    return html.escape(printable(str(text))[:most])


def _line(series: Series, name: str, colour: int, *, dash: str = "solid", points: bool = False) -> dict:
    """Draws a curve; a short one has points, as one point makes no line."""
    thin = series.thin()
    shade = COLOURS[colour % len(COLOURS)]
    return {
        "type": "scatter",
        "mode": "lines+markers" if points or len(thin.steps) <= _FEW_POINTS else "lines",
        "x": thin.steps,
        "y": [float(f"{value:.5g}") for value in thin.values],
        "name": _safe(name),
        "line": {"color": shade, "width": 2, "dash": dash},
        "marker": {"color": shade, "size": 7 if points else 5},
    }


def _raw_and_smooth(series: Series, name: str) -> list[dict]:
    """Draws raw points faintly behind their smoothed line; few points are a line of their own."""
    if len(series.steps) <= _FEW_POINTS:
        return [_line(series, name, 0)]
    raw = _line(series, f"{name}, each step", 0)
    raw |= {"mode": "markers", "marker": {"color": COLOURS[0], "size": 4}, "opacity": 0.35, "showlegend": False}
    return [raw, _line(series.smooth(), name, 0)]


def _draw_loss(report: Mapping, records: Sequence[Mapping]) -> Figure | None:
    loss = read_series(records, "loss")
    traces = _raw_and_smooth(loss, "training") if loss else []
    for place, (measure, name) in enumerate((("eval_loss", "held out"), ("eval_ema_loss", "held out, EMA")), 1):
        if series := read_series(records, measure):
            dash = "solid" if place == 1 else "dot"
            trace = _line(series, name, place, dash=dash, points=True)
            traces.append(trace | {"marker": {**trace["marker"], "symbol": ("circle", "diamond")[place - 1]}})
    bad, alarms = read_marks(records)
    marks = (("skipped or bad step", bad, "x", 3), ("alarm", alarms, "triangle-up", 4))
    for name, found, symbol, place in marks:
        if found:
            steps = sorted(found)[:_MOST_MARKS]
            mark = {"type": "scatter", "mode": "markers", "yaxis": "y2", "x": steps, "y": [0.03] * len(steps)}
            mark |= {"name": name, "text": [_safe(found[step]) for step in steps], "hovertemplate": "%{text}"}
            traces.append(mark | {"marker": {"color": COLOURS[place], "size": 10, "symbol": symbol}})
    text = "Mean over trained tokens, in nats." if (report.get("method") or {}).get("name") == "sft" else ""
    if len(loss.steps) > _FEW_POINTS:
        text += " Points: each step; line: smoothed."
    if bad or alarms:
        text += " Marks at the lower edge are steps that were not taken, or alarms; the list is below."
    hidden = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}
    return Figure("Loss", text, traces, {"yaxis2": hidden, "height": 380}, is_wide=True) if traces else None


def _draw_measure(records: Sequence[Mapping], measure: str, title: str, *, smooth: bool = True) -> Figure | None:
    series = read_series(records, measure)
    if not series:
        return None
    traces = _raw_and_smooth(series, title.partition(",")[0].lower()) if smooth else [_line(series, title.lower(), 0)]
    layout: dict = {"yaxis": {"rangemode": "tozero"}}
    layout["showlegend"] = False
    text = "Points: each step; line: smoothed." if len(traces) > 1 else ""
    return Figure(title, text, traces, layout)


def _draw_groups(records: Sequence[Mapping]) -> Figure | None:
    """Draws norms by their logarithm: those of one run differ by orders of magnitude."""
    steps, groups = read_groups(records)
    rows = [[round(math.log10(one), 3) if one else None for one in norms] for norms in groups.values()]
    known = [one for row in rows for one in row if one is not None]
    if not known:
        return None
    low, high = min(known), max(known)
    ticks = [low + (high - low) * part / 4 for part in range(5)] if high > low else [low]
    scale = {"tickvals": ticks, "ticktext": [f"{10**tick:.2g}" for tick in ticks], "thickness": 12, "outlinewidth": 0}
    labels = [_safe(label, 32) for label in groups]
    trace = {"type": "heatmap", "x": steps, "y": labels, "z": rows, "colorscale": "Viridis", "colorbar": scale}
    shown = [[None if one is None else f"{10**one:.3g}" for one in row] for row in rows]
    trace |= {"text": shown, "hovertemplate": "step %{x}, %{y}: %{text}<extra></extra>"}
    layout = {
        "height": min(620, 150 + 22 * len(labels)),
        "hovermode": "closest",
        "yaxis": {"type": "category", "showgrid": False},
        "xaxis": {"showgrid": False},
    }
    text = "Each column is a logging step; the scale is logarithmic. Empty: no gradient, or none that is finite."
    return Figure("Gradient norm of each layer", text, [trace], layout, is_wide=True)


def _draw_memory(report: Mapping) -> Figure | None:
    phases = (report.get("memory") or {}).get("phases") or {}
    sides = (("predicted", "predicted_bytes", 1), ("measured", "measured_bytes", 0))
    biggest = max((as_number(one.get(key)) or 0 for one in phases.values() for _, key, _ in sides), default=0)
    unit, name = (GIB, "GiB") if biggest >= GIB else (MIB, "MiB")
    traces = []
    for side, key, place in sides:
        sizes = [as_number(one.get(key)) for one in phases.values()]
        if any(sizes):
            values = [None if size is None else round(size / unit, 3) for size in sizes]
            bar = {"type": "bar", "orientation": "h", "y": [_safe(phase) for phase in phases], "x": values}
            bar |= {"name": side, "text": ["" if value is None else f"{value:.3g}" for value in values]}
            bar |= {"textposition": "outside", "cliponaxis": False, "hovertemplate": f"%{{x:.2f}} {name}"}
            traces.append({**bar, "marker": {"color": COLOURS[place]}})
    upright = {"type": "category", "autorange": "reversed", "showgrid": False}
    layout = {"barmode": "group", "xaxis": {"title": {"text": name}}, "yaxis": upright, "hovermode": "closest"}
    return Figure("Peak GPU memory of each phase", "", traces, layout | {"margin": {"r": 40}}) if traces else None


def _draw_rewards(records: Sequence[Mapping]) -> Figure | None:
    traces = []
    for place, (measure, name) in enumerate(_REWARDS):
        for prefix, of, dash in (("", "", "solid"), ("eval_", ", held out", "dot")):
            if series := read_series(records, f"{prefix}rewards/{measure}"):
                traces.append(_line(series, name + of, place, dash=dash, points=bool(prefix)))
    text = "Margin: reward of the better answer less that of the worse one."
    return Figure("Rewards", text, traces, {}) if traces else None


def _draw_accuracy(records: Sequence[Mapping]) -> Figure | None:
    traces = []
    for place, (prefix, name) in enumerate((("", "training"), ("eval_", "held out"), ("eval_ema_", "held out, EMA"))):
        if series := read_series(records, f"{prefix}rewards/accuracies"):
            traces.append(_line(series, name, place, points=bool(prefix)))
    layout = {"yaxis": {"range": [0, 1.05], "tickformat": ".0%"}}
    return Figure("Share of pairs whose better answer wins", "", traces, layout) if traces else None
