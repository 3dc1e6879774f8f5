"""What a run of `python -m benchmarks train --name NAME` leaves: its JSON, a bar chart, and README's table."""

from __future__ import annotations

import json
from pathlib import Path

from smollm2.files import write_durably
from smollm2.plots import BLUE, GREY, figure, label, png_bytes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKS = "<!-- {name}: made by a benchmark -->\n", "<!-- end of {name} -->"


def table(rows: list[dict]) -> str:
    lines = ["| training | tokens/s | model GFLOP/s | of the GEMM roof | peak memory | ours is faster by |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        memory = f"{row['peak_memory_bytes'] / 1e9:.2f} GB" if "peak_memory_bytes" in row else ""
        ratio = f"{row['ours_is_faster_by']:.2f}" if "ours_is_faster_by" in row else ""
        speed = f"{row['tokens_per_second']:,.0f} | {row['model_flops_per_second'] / 1e9:,.0f}"
        share = f"{row['share_of_gemm_roof']:.0%}"
        lines.append(f"| {row['name']}, {row['dtype']} | {speed} | {share} | {memory} | {ratio} |")
    return "\n".join(lines) + "\n"


def chart(rows: list[dict], title: str):
    """Bars in GFLOP/s of the model, the one unit of contenders whose networks differ; ours is the dark one."""
    fig, axis = figure(7.5, 0.9 + 0.45 * len(rows))
    names = [f"{row['name']}, {row['dtype']}" for row in rows]
    rates = [row["model_flops_per_second"] / 1e9 for row in rows]
    bars = axis.barh(names, rates, color=[BLUE, *[GREY] * (len(rows) - 1)])
    axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    label(axis, title, "GFLOP/s of the model, median", "")
    return fig


def publish(name: str, result: dict) -> None:
    """Write results/NAME.json and NAME.png, and README's table between the marks of this name where it has
    them."""
    rows, setting = result["rows"], result["setting"]
    RESULTS.mkdir(exist_ok=True)
    write_durably(RESULTS / f"{name}.json", json.dumps(result, indent=1).encode() + b"\n")
    title = "Training {preset}, {batch} x {length} tokens".format(**setting)
    write_durably(RESULTS / f"{name}.png", png_bytes(chart(rows, title)))
    said = ", ".join(f"{row['name']} {row['model_flops_per_second'] / 1e9:,.0f}" for row in rows)
    picture = f'<img src="benchmarks/results/{name}.png" width="720" alt="{title}, GFLOP/s: {said}.">\n'
    begin, end = (mark.format(name=name) for mark in MARKS)
    readme = ROOT / "README.md"
    before, found, rest = readme.read_text().partition(begin)
    if found:
        _, _, after = rest.partition(end)
        write_durably(
            readme, (before + begin + "\n" + table(rows) + "\n" + picture + "\n" + end + after).encode()
        )
