"""``python -m cmlib bench [--only slider,exact,...] [--readme]``: every claimed number, measured and printed as tables.

``--readme`` puts the tables of the sections that ran into README.md, each with its machine, versions and date; the others stay.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator

import torch

from ..lab.runs import machine
from . import atlas, curves, deep, integers, learned, quantized, readme, scoring, structures, tables, twice

SECTIONS: dict[str, Callable[[], Iterator[str]]] = {
    "import": tables.importing, "exact": tables.exact, "slider": tables.slider, "han": tables.han, "zoo": tables.zoo, "sparse": tables.sparse,
    "structures": structures.structures, "twice": twice.twice, "sparsest": structures.sparsest, "curves": curves.curves, "scoring": scoring.scoring,
    "learned": learned.learned, "atlas": atlas.atlas, "quantized": quantized.quantized, "by_bits": quantized.by_bits, "deep": deep.deep,
    "int8": integers.int8, "xnor": integers.xnor, "kmeans": quantized.kmeans, "bits": tables.bits,
    "notebooks": tables.notebooks,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cmlib bench")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, of {', '.join(SECTIONS)}")
    parser.add_argument("--readme", action="store_true", help="put the tables into README.md")
    asked = parser.parse_args()
    unknown = set(asked.only.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    measured = f"_Measured on {machine()}, {time.strftime('%Y-%m-%d')}._"
    print(measured)
    for name in asked.only.split(","):
        lines = []
        for line in SECTIONS[name]():
            print(line, flush=True)
            lines.append(line)
        if asked.readme:
            readme.write(f"bench {name}", "\n".join([*lines, "", measured]))


if __name__ == "__main__":
    main()
