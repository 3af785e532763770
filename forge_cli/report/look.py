"""Style and script of a page: no font, picture or script from elsewhere; light, dark, narrow and printed."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light; --back: #fff; --panel: #f6f7f9; --ink: #1b1f24; --soft: #59636e; --rule: #d5dae0;
  --link: #0a58ca; --mark: #fff3c9; --c1: #0060a8; --c2: #c24a00; --c3: #00795a; --c4: #b3261e; --c5: #8a5a00;
  --c6: #7b3fa0; }
@media (prefers-color-scheme: dark) { :root:not([data-print]) { color-scheme: dark; --back: #12161b; --panel: #1b2129;
  --ink: #e8ebef; --soft: #a5afba; --rule: #37404b; --link: #7fb8ff; --mark: #4a3d10; --c1: #62b5ff; --c2: #ff9a5c;
  --c3: #3fd1a1; --c4: #ff7a70; --c5: #f0b84a; --c6: #cf9cf0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--back); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .25rem 0; }
h2 { font-size: 1.25rem; margin: 2.25rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
h4 { font-size: .85rem; font-weight: 600; margin: .4rem 0 0; color: var(--soft); }
a { color: var(--link); }
p, ul { margin: .4rem 0; }
.soft, figcaption p { color: var(--soft); font-size: .9rem; }
.verdict { list-style: none; margin: 1rem 0; padding: .75rem 1rem; background: var(--panel);
  border-left: 4px solid var(--c1); border-radius: 4px; font-size: 1.1rem; }
.verdict li + li { margin-top: .3rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--panel); border-radius: 6px; min-width: 0; break-inside: avoid; }
figure.wide { grid-column: 1 / -1; }
figcaption p { margin: 0; }
.box { overflow-x: auto; overflow-wrap: break-word; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 400; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.box th, .short { white-space: nowrap; }
.box td { min-width: 5rem; }
.box td:not(.short, .number) { min-width: 11rem; max-width: 44rem; overflow-wrap: anywhere; }
.plots + .plots, .box + .plots, ul + .plots { margin-top: 1rem; }
code, pre { font: .9em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: .2rem 0 .3rem; padding: .6rem .75rem; background: var(--panel); border-radius: 4px;
  white-space: pre-wrap; }
.sample { margin: 0 0 1.5rem; break-inside: avoid; }
.sample h3 { white-space: pre-wrap; }
.pair { display: grid; gap: 0 1rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
details { margin: .75rem 0; }
summary { cursor: pointer; padding: .3rem 0; }
input { font: inherit; padding: .4rem .6rem; margin: .4rem 0; width: min(100%, 24rem); background: var(--back);
  color: var(--ink); border: 1px solid var(--soft); border-radius: 4px; }
@media (max-width: 44rem) { body { padding: .75rem; } .plots, .pair { grid-template-columns: minmax(0, 1fr); }
  figure { padding: .6rem .4rem; } figcaption { padding: 0 .3rem; } h1 { font-size: 1.35rem; } }
@media print { nav, input { display: none; } body { max-width: none; padding: 0; } a { color: inherit; } }
"""

# `var(--name)` in a figure is replaced by the value that the theme gives it; a figure is drawn anew when that changes.
SCRIPT = """
const figures = JSON.parse(document.getElementById("figure-data").textContent);
const root = document.documentElement;
const coarse = matchMedia("(pointer: coarse)").matches;
function paint(value, style) {
  if (typeof value === "string" && value.startsWith("var(")) return style.getPropertyValue(value.slice(4, -1)).trim();
  if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map((one) => paint(one, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, paint(one, style)]));
}
function merge(base, extra) {
  for (const [key, one] of Object.entries(extra)) {
    const deep = one !== null && typeof one === "object" && !Array.isArray(one) && typeof base[key] === "object";
    base[key] = deep ? merge(base[key], one) : one;
  }
  return base;
}
function draw() {
  const style = getComputedStyle(root);
  const axis = () => ({ gridcolor: "var(--rule)", linecolor: "var(--rule)", zeroline: false, automargin: true,
    exponentformat: "e", title: { standoff: 6 } });
  figures.forEach((figure, place) => {
    const layout = merge({ height: 320, margin: { l: 8, r: 12, t: 8, b: 8 }, paper_bgcolor: "var(--panel)",
      plot_bgcolor: "var(--panel)", font: { color: "var(--ink)", family: "system-ui, sans-serif", size: 12 },
      xaxis: merge(axis(), { title: { text: "step" } }), yaxis: axis(), showlegend: figure.traces.length > 1,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" }, hovermode: "x unified",
      hoverlabel: { bgcolor: "var(--back)", bordercolor: "var(--rule)", font: { color: "var(--ink)" } },
      dragmode: coarse ? false : "zoom" }, structuredClone(figure.layout));
    Plotly.react("plot" + place, paint(figure.traces, style), paint(layout, style),
      { responsive: true, displayModeBar: false });
  });
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("beforeprint", () => {
  root.dataset.print = "";
  document.querySelectorAll("details").forEach((one) => { one.dataset.was = one.open; one.open = true; });
  draw();
});
addEventListener("afterprint", () => {
  delete root.dataset.print;
  document.querySelectorAll("details").forEach((one) => { one.open = one.dataset.was === "true"; });
  draw();
});
const filter = document.getElementById("filter");
if (filter) filter.addEventListener("input", () => {
  const wanted = filter.value.toLowerCase();
  for (const row of document.querySelectorAll("#settings tbody tr"))
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
});
"""
