"""Merge results folders of other machines or GPUs into benchmarks/results.

    python benchmarks/merge_results.py FOLDER...

Rows of FOLDER/*.csv replace those of the same key; FOLDER/*.txt are copied, logs are not.
"""

import argparse
import shutil
from pathlib import Path

import harness

HOME = harness.ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        for path in sorted(folder.iterdir()):
            if path.suffix == ".csv":
                harness.upsert(harness.read_rows(path), HOME / path.name)
            elif path.suffix == ".txt":
                shutil.copyfile(path, HOME / path.name)
            else:
                continue
            print(f"{path} -> {HOME / path.name}")


if __name__ == "__main__":
    main()
