"""Reports: a comparison as one self-contained HTML file, or as Markdown."""

import io
import re
from collections.abc import Callable
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from metarec_jax.data.schema import USER
from metarec_jax.evaluation.baselines import BASELINES
from metarec_jax.evaluation.comparison import Comparison
from metarec_jax.evaluation.intervals import (
    LESS_IS_BETTER,
    METRICS,
    Difference,
    best_baseline,
    by_segment,
    difference,
    holm,
    values,
)
from metarec_jax.evaluation.protocol import in_words
from metarec_jax.metrics import pointwise as metrics

MAIN = {"click": "within_user_auc", "rating": "rmse"}  # main metric of plots and intervals
GREY = "#808080"  # readable on white and on black
ENOUGH = 20  # interactions that a bin of the calibration plot needs
TICKS = (0, 0.25, 0.5, 0.75, 1)
PANELS = 3  # a row of the calibration plot
CALIBRATION = (
    "Share of clicks against predicted probability; the dashed diagonal is perfect calibration. Bars count the "
    f"interactions of each bin over all splits (right axis); bins of fewer than {ENOUGH} have no point. "
    "The error is the expected calibration error: the mean distance to the diagonal, weighted by counts."
)
STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #8884; }
th { vertical-align: bottom; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
.best { font-weight: 700; }
.baseline { color: #808080; }
code { overflow-wrap: anywhere; }
svg { width: 100%; min-width: 40rem; height: auto; }
"""


def leaderboard(comparison: Comparison, *, draws: int = 2000) -> tuple[list[str], list[list[str]]]:
    """Build the header and rows of the leaderboard.

    Columns: every metric with the full support; the main metric's difference to the best baseline with its 95 %
    interval over users; Holm's p over all strategies; and the costs.

    Args:
      comparison: from `compare`.
      draws: bootstrap samples of the intervals.
    """
    main, learners = MAIN[comparison.kind], comparison.learners
    rival = best_baseline(comparison, main)
    strategies = [n for n in learners if n not in BASELINES]
    differences = {n: difference(comparison, n, rival, main, draws=draws) for n in strategies}
    corrected = holm({n: d.p for n, d in differences.items()})
    rows = []
    for name in learners:
        row = [name, *(f"{np.nanmean(values(comparison, name, m)):.4f}" for m in METRICS[comparison.kind])]
        if name in BASELINES:
            rows.append([*row, "-", "-", "-", "-", "-"])
            continue
        costs = [comparison.runs[name, seed].cost for seed in comparison.seeds]
        cost = {key: float(np.median([c[key] for c in costs])) for key in costs[0]}
        shown = (f"{cost['train_s']:.1f}", f"{cost['adapt_ms']:.4f}", f"{cost['bytes']:.0f}")
        rows.append([*row, _interval(differences[name]), f"{corrected[name]:.3f}", *shown])
    header = ["learner", *METRICS[comparison.kind], f"{main} minus {rival}", "p (Holm)"]
    return [*header, "train s", "adapt ms/user", "bytes/user"], rows


def markdown(comparison: Comparison, *, draws: int = 2000) -> str:
    """Format the leaderboard as Markdown, below a line that describes the setting.

    Args:
      comparison: from `compare`.
      draws: bootstrap samples of the intervals.
    """
    header, rows = leaderboard(comparison, draws=draws)
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join([in_words(comparison.setting), "", *lines])


def report(comparison: Comparison, path: str | Path, *, draws: int = 2000) -> Path:
    """Write the HTML report of a comparison.

    It holds the leaderboard, quality by support size, segments, calibration, learning curves and cost.

    Args:
      comparison: from `compare`.
      path: the output file.
      draws: bootstrap samples of the intervals.

    Returns:
      The path.

    Raises:
      ImportError: matplotlib is not installed.
    """
    plots: list[tuple[str, str, Callable[[Comparison, Any], None]]] = [
        (
            "Quality against support size",
            "Difference to the best baseline of each size; 95 % intervals.",
            _by_support(draws),
        ),
        ("Segments", "The main metric within groups of users, and AUC or RMSE within groups of items.", _segments),
        ("Learning curves", "Validation users; mean over the splits that reached the epoch.", _learning),
        ("Quality against cost", "Seconds of training, and the main metric with all support.", _costs),
    ]
    if comparison.kind == "click":
        plots.insert(2, ("Calibration", CALIBRATION, _calibration))
    header, rows = leaderboard(comparison, draws=draws)
    quality = 1 + len(METRICS[comparison.kind])  # the other columns are for strategies only
    rest = [row[:1] + row[quality:] for row in rows if row[0] not in BASELINES]
    failed = "".join(
        f"<li>{escape(name)}, split {seed}: {escape(why)}</li>" for (name, seed), why in comparison.failed.items()
    )
    body = [
        f"<h1>{escape(comparison.setting['data'])}: {len(comparison.learners)} learners</h1>",
        f"<p>Hash <code>{comparison.setting['hash']}</code>; results with another hash are not comparable.</p>",
        f"<p><code>{escape(in_words(comparison.setting))}</code></p>",
        "<h2>Leaderboard</h2>",
        _table(header[:quality], [row[:quality] for row in rows]),
        "<h2>Difference to the best baseline, and cost</h2>",
        "<p>With the full support: 95 % interval over users, p corrected over all strategies, median cost.</p>",
        _table(header[:1] + header[quality:], rest),
        *(f"<h2>{title}</h2><p>{text}</p>{_svg(comparison, draw)}" for title, text, draw in plots),
        f"<h2>Failed</h2><ul>{failed}</ul>" if failed else "",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(comparison.setting['data'])}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _interval(change: Difference) -> str:
    return f"{change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Format an HTML table: baselines in grey, the best of each metric in bold."""
    best = {}
    for column, metric in enumerate(header):
        if metric in {m for names in METRICS.values() for m in names}:
            choose = min if metric in LESS_IS_BETTER else max
            best[column] = choose((row[column] for row in rows), key=float)
    head = "".join(f"<th>{escape(name).replace('_', '_<wbr>')}</th>" for name in header)  # may break there
    lines = []
    for row in rows:
        cells = "".join(
            f'<td class="best">{escape(cell)}</td>' if best.get(i) == cell else f"<td>{escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        lines.append(f'<tr class="baseline">{cells}</tr>' if row[0] in BASELINES else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _svg(comparison: Comparison, draw: Callable[[Comparison, Any], None]) -> str:
    """Render a matplotlib figure by `draw` as inline SVG, without XML header and metadata."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the report needs matplotlib: pip install 'metarec-jax[plot]'") from error
    look: dict[Any, Any] = {f"{part}.color": GREY for part in ("text", "xtick", "ytick")}
    look |= {"axes.labelcolor": GREY, "axes.edgecolor": GREY, "axes.titlecolor": GREY, "legend.labelcolor": GREY}
    look |= {"axes.spines.top": False, "axes.spines.right": False}
    with rc_context({**look, "svg.fonttype": "none", "svg.hashsalt": draw.__name__}):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        draw(comparison, figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return f'<div class="wide">{svg}</div>'


def _by_support(draws: int) -> Callable[[Comparison, Any], None]:
    def draw(comparison: Comparison, figure: Any) -> None:
        axes, metric, sizes = figure.subplots(), MAIN[comparison.kind], comparison.setting["support"]
        axes.axhline(0, color=GREY, linewidth=1)
        rivals = [best_baseline(comparison, metric, size) for size in sizes]
        for name in (n for n in comparison.learners if n not in BASELINES):
            pairs = zip(rivals, sizes, strict=True)
            differences = [difference(comparison, name, rival, metric, size, draws=draws) for rival, size in pairs]
            (line,) = axes.plot(range(len(sizes)), [d.mean for d in differences], marker="o", label=name)
            low, high = [d.low for d in differences], [d.high for d in differences]
            axes.fill_between(range(len(sizes)), low, high, alpha=0.12, color=line.get_color())
        axes.set_xticks(range(len(sizes)), ["all" if size is None else str(size) for size in sizes])
        axes.set(xlabel="support examples", ylabel=f"{metric} minus best baseline")
        _legend(axes)

    return draw


def _segments(comparison: Comparison, figure: Any) -> None:
    pooled = "auc" if comparison.kind == "click" else "rmse"
    shown = [s for s, labels in comparison.segments.items() if 1 < len(set(labels.tolist()) - {""}) <= 6][:4]
    rows = -(-len(shown) // 2)
    figure.set_size_inches(9, 0.4 + 3 * rows)
    panels = figure.subplots(rows, 2, squeeze=False).ravel() if shown else []
    for axes, segment in zip(panels, shown, strict=False):
        metric = MAIN[comparison.kind] if segment.startswith(USER) else pooled
        by_learner = {name: by_segment(comparison, name, metric, segment) for name in comparison.learners}
        labels = list(next(iter(by_learner.values())))
        width = 0.8 / len(by_learner)
        for i, (name, row) in enumerate(by_learner.items()):
            axes.bar(np.arange(len(labels)) + i * width, [row.get(k, np.nan) for k in labels], width, label=name)
        heights = [v for row in by_learner.values() for v in row.values()]
        axes.set_ylim(min(heights) - 0.02, max(heights) + 0.02)
        axes.set_xticks(np.arange(len(labels)) + 0.4 - width / 2, labels, rotation=30 if len(labels) > 3 else 0)
        axes.set(title=segment, ylabel=metric)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    if shown:
        figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside right")


def _calibration(comparison: Comparison, figure: Any) -> None:
    """Draw a panel for each learner: its reliability curve, and the number of interactions in each bin."""
    learners = comparison.learners
    rows = -(-len(learners) // PANELS)
    figure.set_size_inches(9, 0.4 + 2.7 * rows)
    panels = figure.subplots(rows, PANELS, squeeze=False).ravel()
    bars = []
    for i, (axes, name) in enumerate(zip(panels, learners, strict=False)):
        runs = [comparison.scores(name, seed) for seed in comparison.seeds]
        scores, target, mask = (jnp.concatenate(arrays) for arrays in zip(*runs, strict=True))
        confidence, share, count = (np.asarray(x) for x in metrics.reliability(scores, target, mask))
        error = float(metrics.calibration_error(scores, target, mask))
        bars.append(counts := axes.twinx())
        counts.bar((np.arange(len(count)) + 0.5) / len(count), count, 0.9 / len(count), color=GREY, alpha=0.3)
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
        enough = count >= ENOUGH
        axes.plot(confidence[enough], share[enough], marker="o", markersize=4)
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=TICKS, yticks=TICKS)
        axes.set_title(f"{name}\nerror {error:.3f}", fontsize="medium")
        axes.set_zorder(counts.get_zorder() + 1)  # curves above bars
        axes.patch.set_visible(False)
        if i % PANELS == 0:
            axes.set_ylabel("share of clicks")
        if i + PANELS >= len(learners):
            axes.set_xlabel("predicted probability")
        if i % PANELS == PANELS - 1 or i == len(learners) - 1:
            counts.set_ylabel("interactions")
        else:
            counts.tick_params(labelright=False)
    highest = max(counts.get_ylim()[1] for counts in bars)
    for counts in bars:
        counts.set_ylim(0, 2 * highest)  # one scale, with the bars in the lower half
    for axes in panels[len(learners) :]:
        axes.set_axis_off()


def _learning(comparison: Comparison, figure: Any) -> None:
    axes, metric = figure.subplots(), MAIN[comparison.kind]
    for name in (n for n in comparison.learners if n not in BASELINES):
        logs = [[e[metric] for e in comparison.runs[name, seed].history] for seed in comparison.seeds]
        longest = max(map(len, logs))
        padded = np.array([log + [np.nan] * (longest - len(log)) for log in logs])
        axes.plot(np.arange(longest) + 1, np.nanmean(padded, 0), marker=".", label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", ylabel=f"validation {metric}")
    _legend(axes)


def _costs(comparison: Comparison, figure: Any) -> None:
    from matplotlib.ticker import LogFormatter

    axes, metric = figure.subplots(), MAIN[comparison.kind]
    quality = {name: float(np.nanmean(values(comparison, name, metric))) for name in comparison.learners}
    for name in (n for n in comparison.learners if n not in BASELINES):
        seconds = np.median([comparison.runs[name, seed].cost["train_s"] for seed in comparison.seeds])
        axes.scatter(seconds, quality[name], label=name)
    baselines = sorted((n for n in comparison.learners if n in BASELINES), key=lambda n: -quality[n])
    styles = ["solid", "dashed", "dashdot", "dotted", (0, (8, 2)), (0, (1, 4))]
    for name, style in zip(baselines, cycle(styles)):
        axes.axhline(quality[name], color=GREY, linewidth=1, linestyle=style, label=name)
    axes.set(xscale="log", xlabel="seconds of training (median)", ylabel=metric)
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(LogFormatter())
    axes.xaxis.set_minor_formatter(LogFormatter())
    _legend(axes)


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
