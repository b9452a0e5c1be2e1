"""Write the tables of results from benchmarks/results/*.csv, between marker comments: those of
README.md, README_zh.md and docs/.

    python benchmarks/make_table.py          # rewrite them
    python benchmarks/make_table.py --check  # exit 1 if one is not what the CSV files give

A table stands between `<!-- benchmark:NAME -->` and `<!-- /benchmark:NAME -->`. NAME is a
benchmark, as `bert_encode`, for a table per device, or `bert_encode:nvidia_h200` for one device.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import bert_encode
import gpt2_context
from harness import BASELINE, PATCHED, RESULTS, ROOT, Row, read_rows, slug

FAIRSEQ = "fairseq"  # what its benchmarks compare with
TITLES = {
    BASELINE: "transformers",
    FAIRSEQ: "fairseq",
    "transformers-eager": "transformers, eager",
    "transformers-flash": "transformers, sdpa by flash",
    "transformers-cudnn": "transformers, sdpa by cuDNN",
    "torch_compile": "torch.compile",
    "transformers-static-compile": "transformers, static cache compiled",
    PATCHED: "eet_patch",
}
UNITS = {
    "bert_encode": "ms a batch",
    "bert_published": "ms a batch",
    "gpt2_generate": "ms a token",
    "gpt2_context": "ms a token",
    "gpt2_prefill": "ms a call",
    "gpt2_options": "ms a token",
    "gpt2_first_call": "ms",
    "fairseq_beam": "ms a step",
    "fairseq_generate": "ms a sentence",
}
# What makes the rows of a benchmark, where that is not the script of its name.
COMMANDS = {"bert_published": "bert_encode.py --published"}
# Columns of some benchmarks alone: what others published for the work of a row.
EET_RATIO = "EET's own ratio, A100, PyTorch of 2021"
QUOTED = {
    "bert_published": (EET_RATIO, bert_encode.published),
    "gpt2_context": (EET_RATIO, gpt2_context.published),
}
MARKER = re.compile(
    r"(<!-- benchmark:(?P<name>[\w:]+) -->\n).*?(<!-- /benchmark:(?P=name) -->)", re.S
)
# What makes two rows measurements of the same work.
WORK = ("model", "dtype", "batch_size", "seq_len", "new_tokens", "fill")


def load(case: str, stem: str = "*") -> list[list[Row]]:
    """Return the checked rows of a benchmark, one list a device. Unchecked rows don't count."""
    devices: dict[str, list[Row]] = {}
    for path in sorted(RESULTS.glob(f"{stem}.csv")):
        for row in read_rows(path):
            if row["case"] != case:
                continue
            if row["checked"] == "true":
                devices.setdefault(row["device"], []).append(row)
            else:
                print(
                    f"{path.name}: {row['model']}, {row['provider']} not checked", file=sys.stderr
                )
    return list(devices.values())


def by_work(rows: list[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Group the rows of one device: work -> provider -> row."""
    grouped: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[column] for column in WORK), {})[row["provider"]] = row
    return grouped


def of_one_run(rows: Iterable[Row]) -> bool:
    """Ratios are taken within a run: rows of two commits may be of two machines of a kind."""
    return len({row["commit"] for row in rows}) == 1


def milliseconds(value: str) -> str:
    """Three significant digits, without an exponent."""
    number = float(value)
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"


def table(rows: list[Row], folder: Path) -> str:
    """One Markdown table, with hardware, versions and command above it, and the chart below where
    make_chart.py has drawn it; `folder` is where the document lies.
    """
    case, unit = rows[0]["case"], UNITS[rows[0]["case"]]
    providers = [name for name in TITLES if any(row["provider"] == name for row in rows)]
    generates = any(row["new_tokens"] != "0" for row in rows)
    facts = [rows[0]["device"]]
    facts += [f"torch {version}" for version in sorted({row["torch"] for row in rows})]
    facts += sorted({row["host"] for row in rows})
    facts += sorted({row["date"] for row in rows})[-1:]
    tokens = "prompt + new tokens" if generates else "tokens (real)"
    header = ["model", "dtype", "batch", tokens]
    header += [f"{TITLES[name]}, {unit}" for name in providers]
    baseline = FAIRSEQ if FAIRSEQ in providers else BASELINE
    others = [name for name in providers if name not in (baseline, PATCHED)]
    compared = baseline in providers
    header += ["speed-up"] if compared else []
    header += ["over the best other"] if others else []
    header += [f"floor, {unit}"]
    header += [QUOTED[case][0]] if case in QUOTED else []
    lines = [header, ["---"] * 4 + ["---:"] * (len(header) - 4)]
    for (model, dtype, batch, seq_len, new_tokens, fill), found in by_work(rows).items():
        length = f"{seq_len} + {new_tokens}" if generates else f"{seq_len} ({float(fill):.0%})"
        times = [milliseconds(found[p]["median_ms"]) if p in found else "–" for p in providers]
        speed_up = "–"
        both = [found[name] for name in (baseline, PATCHED) if name in found]
        if len(both) == 2 and of_one_run(both):
            ratio = float(found[baseline]["median_ms"]) / float(found[PATCHED]["median_ms"])
            speed_up = f"{ratio:.2f}x"
        ratios = [speed_up] if compared else []
        if others:
            best = min((float(found[p]["median_ms"]) for p in found if p != PATCHED), default=0.0)
            known = best and PATCHED in found and of_one_run(found.values())
            ratios.append(f"{best / float(found[PATCHED]['median_ms']):.2f}x" if known else "–")
        first = next(iter(found.values()))
        floor = milliseconds(first["floor_ms"]) if first["floor_ms"] else "–"
        quoted = [QUOTED[case][1](first)] if case in QUOTED else []
        lines.append([model, dtype, batch, length, *times, *ratios, floor, *quoted])
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    picture = ROOT / "docs" / f"benchmark_{case}_{slug(rows[0]['device'])}.png"
    link = f"\n![{case} on {rows[0]['device']}]({os.path.relpath(picture, folder)})\n"
    drawn = link if picture.exists() else ""
    command = f"python benchmarks/{COMMANDS.get(case, f'{case}.py')}"
    return f"{', '.join(facts)}; medians. `{command}`\n\n{body}\n{drawn}"


def fill_in(text: str, folder: Path = ROOT) -> str:
    """Return a document's text with every marked table made anew."""

    def replace(match: re.Match[str]) -> str:
        case, _, stem = match["name"].partition(":")
        if case not in UNITS:
            raise SystemExit(f"benchmark:{match['name']}: the benchmarks are {', '.join(UNITS)}")
        tables = "\n".join(table(rows, folder) for rows in load(case, stem or "*"))
        return f"{match[1]}{tables or 'Not measured yet.' + chr(10)}{match[3]}"

    text = re.sub(
        r"(<!-- targets -->\n).*?(<!-- /targets -->)",
        lambda match: f"{match[1]}{targets()}{match[2]}",
        text,
        flags=re.S,
    )
    text = re.sub(
        r"(<!-- serving -->\n).*?(<!-- /serving -->)",
        lambda match: f"{match[1]}{serving()}{match[2]}",
        text,
        flags=re.S,
    )
    return MARKER.sub(replace, text)


def serving() -> str:
    """What examples/serve_load_test.py --record measured, a table a device."""
    tables = []
    for path in sorted((RESULTS / "serving").glob("*.csv")):
        rows = read_rows(path)
        first = rows[0]
        lines = [
            ["", "requests a second", "p50, ms", "p99, ms", "lost", "largest difference"],
            ["---"] + ["---:"] * 5,
        ]
        lines += [
            [
                TITLES[row["provider"]],
                row["requests_per_second"],
                row["p50_ms"],
                row["p99_ms"],
                f"{row['lost']} of {row['requests']}",
                row["max_difference"] or "–",
            ]
            for row in rows
        ]
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        facts = [first["device"], first["model"], f"torch {first['torch']}", first["host"]]
        facts += [f"{first['clients']} clients", first["date"]]
        rates = {row["provider"]: float(row["requests_per_second"]) for row in rows}
        ratio = f"{rates[PATCHED] / rates[BASELINE]:.2f}x the requests"
        tables.append(f"{', '.join(facts)}: {ratio}.\n\n{body}\n")
    return "\n".join(tables) or "Not measured yet.\n"


def targets() -> str:
    """The table of what is replaced, from TARGETS itself."""
    from eet_patch.targets import TARGETS

    rows = ["| name | replaced | versions |", "|---|---|---|"]
    rows += [f"| {t.name} | `{t.attribute}` of `{t.module}` | {t.requires} |" for t in TARGETS]
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    args = parser.parse_args()
    stale = 0
    for path in (*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))):
        old = path.read_text(encoding="utf-8")
        new = fill_in(old, path.parent)
        if new == old:
            continue
        if args.check:
            print(f"{path.name} is stale: run python benchmarks/make_table.py", file=sys.stderr)
            stale = 1
        else:
            path.write_text(new, encoding="utf-8")
            print(f"{path.name} rewritten")
    return stale


if __name__ == "__main__":
    raise SystemExit(main())
