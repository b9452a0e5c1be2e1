"""Draw the results of benchmarks/results/*.csv as bars, one PNG a benchmark and device, into docs/.

    python benchmarks/make_chart.py  # docs/benchmark_bert_encode_<device>.png, ...

A bar is a time as a share of the unpatched model's, since the cases lie far apart; its label is
the median in milliseconds. The rows are the README's: checked ones, slower cases kept.
"""

import argparse
from pathlib import Path

import matplotlib
from harness import BASELINE, PATCHED, ROOT, Row, slug
from make_table import TITLES, UNITS, by_work, load, milliseconds

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot  # noqa: E402

OTHERS = ("#9aa5b1", "#52606d", "#7b8794", "#cbd2d9", "#b8a9c9", "#c9a227", "#8fb996")
COLOURS = dict(zip([name for name in TITLES if name != PATCHED], OTHERS, strict=True))
COLOURS[PATCHED] = "#2f6fde"


def label(work: tuple[str, ...]) -> str:
    model, dtype, batch, seq_len, new_tokens, fill = work
    length = f"{seq_len} + {new_tokens}" if new_tokens != "0" else seq_len
    real = "" if float(fill) == 1 else f", {float(fill):.0%} real"
    return f"{model}, {dtype}\nbatch {batch}, {length} tokens{real}"


def draw(rows: list[Row], out: Path) -> Path:
    """Draw one device's rows of one benchmark; returns the file written."""
    case = rows[0]["case"]
    works = {work: found for work, found in by_work(rows).items() if BASELINE in found}
    providers = [name for name in TITLES if any(name in found for found in works.values())]
    height = 0.8 / len(providers)
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.75 * len(works)), layout="constrained")
    for index, name in enumerate(providers):
        for position, found in enumerate(works.values()):
            if name not in found:
                continue
            share = float(found[name]["median_ms"]) / float(found[BASELINE]["median_ms"])
            y = position + (index - (len(providers) - 1) / 2) * height
            axes.barh(y, share, height * 0.92, color=COLOURS[name])
            text = milliseconds(found[name]["median_ms"])
            axes.text(share + 0.01, y, text, va="center", fontsize=8)
        axes.barh(0, 0, color=COLOURS[name], label=TITLES[name])  # one entry in the legend
    axes.set_yticks(range(len(works)), [label(work) for work in works], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"time as a share of transformers' own; labels: median, {UNITS[case]}")
    axes.set_title(f"{case}: {rows[0]['device']}, {rows[0]['host']}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(providers), frameon=False, fontsize=8)
    path = out / f"benchmark_{case}_{slug(rows[0]['device'])}.png"
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})  # the same rows give the same bytes
    pyplot.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the charts")
    args = parser.parse_args()
    for case in UNITS:
        for rows in load(case):
            if any(row["provider"] == BASELINE for row in rows):
                print(draw(rows, args.out))


if __name__ == "__main__":
    main()
