"""Write the tables of docs/benchmarks.md whose figures are in benchmarks/results; `--check` only compares.

python docs/make_tables.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
WAYS = {
    "packed, flex": "packed, flex attention",
    "BERT, padded": "`BertForMaskedLM`, padded",
    "ModernBERT, padded": "`ModernBertForMaskedLM`, padded",
}


def gpu(results: dict) -> str:
    """Return the table of training steps; of rows that were measured again, the last measurement."""
    rows = {(step["size"], step["way"]): step for step in results["steps"]}
    lines = ["| model | way | tokens/s | cells/s | MFU | peak GB |", "|---|---|---|---|---|---|"]
    for (size, way), step in sorted(rows.items(), key=lambda row: (row[0][0], -row[1]["tokens_per_second"])):
        figures = f"{step['tokens_per_second']:,} | {step['cells_per_second']:,.0f} | {step['mfu']:.1%}".replace(
            "%", " %"
        )
        lines.append(f"| {size} | {WAYS.get(way, way)} | {figures} | {step['peak_gb']:.1f} |")
    return "\n".join(lines)


def gpu_loader(results: dict) -> str:
    """Return the table of training through the trainer, by the number of worker processes."""
    lines = ["| workers | tokens/s | waiting for data |", "|---|---|---|"]
    for workers, row in results["loader"].items():
        lines.append(
            f"| {workers.split()[0]} | {row['tokens_per_second']:,.0f} | {100 * row['data_wait_share']:.1f} % |"
        )
    return "\n".join(lines)


def objectives(results: dict) -> str:
    """Return the scores of the objectives, and their differences to step 0."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.objectives import table

    return table(results["runs"])


def perturb_speed(results: dict) -> str:
    """Return the table of edited cells per second, and of memory."""
    rows = results["speed"]["rows"]
    base = rows["one at a time"]["cells_per_second"]
    lines = ["| way | edited cells | cells/s | against one at a time | peak MB |", "|---|---|---|---|---|"]
    for way, row in rows.items():
        n, rate = row["runs"][0]["cells"], row["cells_per_second"]
        lines.append(f"| {way} | {n:,.0f} | {rate:,.1f} | {rate / base:,.1f} | {row['peak_mb']:,.0f} |")
    return "\n".join(lines)


def perturb_simulation(results: dict) -> str:
    """Return recall and false positives at 5 % FDR, summed over draws."""
    lines = [
        "| drivers, donors' sd | model | PCA | logistic regression | others with p < .05 |",
        "|---|---|---|---|---|",
    ]
    draws = results["simulation"]
    for kind in dict.fromkeys((row["drivers"], row["donor_sd"]) for row in draws):
        of = [row for row in draws if (row["drivers"], row["donor_sd"]) == kind]
        cells = []
        for name in ("model", "pca", "linear"):
            false = sum(row[f"{name}_false"] for row in of) / sum(row["genes"] - row["drivers"] for row in of)
            recall = f"{sum(row[f'{name}_recall'] for row in of) / len(of):.2f}, " if kind[0] else ""
            cells.append(f"{recall}{100 * false:.1f} %")
        share = 100 * sum(row["share_p_05"] for row in of) / len(of)
        lines.append(f"| {kind[0]}, {kind[1]:g} | {' | '.join(cells)} | {share:.1f} % |")
    return "\n".join(lines)


def perturb_interferon(results: dict) -> str:
    """Return what deleting interferon genes does to stimulated cells."""
    lines = [
        "| score | all together | z | single genes that move to control | of these below 5 % FDR | median z |",
        "|---|---|---|---|---|---|",
    ]
    names = {"model": "model", "pca": "PCA", "linear": "logistic regression, probability"}
    for key, name in names.items():
        row = results["interferon"][key]
        mean, low, high, z = row["all_genes"]
        counts = f"{row['to_control']} of {row['genes']} | {row['below_fdr_05']} | {row['median_z']:.1f}"
        lines.append(f"| {name} | {mean:+.3f} [{low:+.3f}, {high:+.3f}] | {z:.1f} | {counts} |")
    return "\n".join(lines)


TABLES = {
    "perturb_2026-11-28": perturb_speed,
    "perturb_2026-11-28 simulation": perturb_simulation,
    "perturb_2026-11-28 interferon": perturb_interferon,
    "gpu_h200_2026-11-28": gpu,
    "gpu_h200_2026-11-28 loader": gpu_loader,
    "objectives_h200_2026-11-28": objectives,
}


def fill(text: str) -> str:
    """Return the page with its machine-written tables replaced."""

    def make(match: re.Match) -> str:
        name = match["name"]
        results = json.loads((ROOT / "benchmarks" / "results" / f"{name.split()[0]}.json").read_text())
        return f"<!-- table: {name} -->\n\n{TABLES[name](results)}\n\n<!-- end of table -->"

    return re.sub(r"<!-- table: (?P<name>.+?) -->.*?<!-- end of table -->", make, text, flags=re.DOTALL)


def main() -> int:
    """Write the page, or with `--check` return 1 where it is not what would be written."""
    text = PAGE.read_text(encoding="utf-8")
    made = fill(text)
    if "--check" in sys.argv[1:]:
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
