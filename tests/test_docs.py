"""Code blocks of the README and of the documentation run as they stand, in order, page by page."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from stformer_hf.cli import main
from stformer_hf.cli.demo import load_cells, split_cells

ROOT = Path(__file__).parents[1]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "recipes/README.md", "benchmarks/README.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.py"))
# Blocks that need a network, a GPU, a cluster or files of others: the page, and the first line of each.
NOT_RUN = {
    "README.md": [
        "pip install '.[demo]'   # without the extra: no plots and no demo",
        "make demo   # cells in; a pretrained model, a classifier, embeddings, plots and demo_output/report.html out",
    ],
    "CONTRIBUTING.md": ["make test         # creates .venv, then lint and all tests except slow and GPU ones"],
    "recipes/README.md": [
        "accelerate launch --config_file recipes/accelerate/ddp.yaml -m stformer_hf.cli pretrain "
        "--config recipes/gene_bert_base.yaml --data atlas --output model"
    ],
    "docs/data.md": ["import cellxgene_census, tiledbsoma"],
    "docs/export.md": ["from torchao.quantization import Int8WeightOnlyConfig"],
    "docs/index.md": ["pip install '.[demo]'"],
    "docs/models.md": ["pip install ./packages/fetal_tiny"],
    "docs/migration/perturbgene.md": ["accelerate launch -m stformer_hf.cli.parse_args \\"],
    "docs/scale.md": [
        'atlas.push_to_hub("user/atlas")  # the files themselves: load_dataset and the dataset viewer read them, too',
        "accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m stformer_hf.cli pretrain "
        "--config recipes/gene_bert_base.yaml --data atlas --output model",
        "ray start --head                                   # on the first machine",
        "cat > build.sbatch <<'END'",
        "accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_machines 2 --num_processes 16 "
        "--machine_rank $RANK --main_process_ip FIRST_MACHINE --main_process_port 29500 -m stformer_hf.cli pretrain "
        "--config recipes/gene_bert_base.yaml --data store --output model",
        "cat > train.sbatch <<'END'",
    ],
    "docs/training.md": [
        "accelerate launch --config_file recipes/accelerate/ddp.yaml -m stformer_hf.cli pretrain "
        "--config recipes/gene_bert_base.yaml --data store --output base"
    ],
}


def test_no_page_has_marks_of_a_merge():
    marks = [page for page in PAGES if re.search(r"^(<{7}|>{7}) ", (ROOT / page).read_text(encoding="utf-8"), re.M)]
    assert not marks


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Return the language, the rest of the info string and the content of each fenced block of a page."""
    tokens = MarkdownIt().parse((ROOT / page).read_text(encoding="utf-8"))
    fences = [token for token in tokens if token.type == "fence"]
    return [(*(token.info.split(maxsplit=1) + ["", ""])[:2], token.content) for token in fences]


def not_run(info: str) -> bool:
    return 'title="not run' in info


@pytest.fixture
def demo_files(tmp_path, monkeypatch):
    """Make a folder with what the pages assume: the files of cells that the demo writes, and the recipes."""
    monkeypatch.chdir(tmp_path)
    cells, _ = load_cells()
    Path("demo_output").mkdir()
    for name, part in zip(("train", "held_out"), split_cells(cells, seed=0), strict=True):
        part.write_h5ad(f"demo_output/{name}.h5ad")
    Path("recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("STFORMER_HF_CACHE", str(tmp_path / "cache"))


def run_python(code: str, name: str, namespace: dict) -> None:
    exec(compile(code, name, "exec"), namespace)


def run_bash(code: str) -> None:
    """Run the lines of a block; `stformer-hf` in this process, which has imported what it needs."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["stformer-hf"]:
            assert main([*words[1:], "--debug"]) == 0, line
        elif words:
            path = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
            subprocess.run(["bash", "-c", f"{path}; {line}"], check=True)


def same_text(printed: str, shown: str) -> bool:
    """Compare two texts word by word; numbers with a decimal point may differ by 0.05."""
    pairs = list(zip(printed.split(), shown.split(), strict=False))
    number = re.compile(r"-?\d*\.\d+")
    return len(printed.split()) == len(shown.split()) and all(
        a == b or (number.fullmatch(a) and number.fullmatch(b) and abs(float(a) - float(b)) <= 0.05) for a, b in pairs
    )


def run_page(page: str, capsys) -> None:
    namespace: dict = {"__name__": "__main__"}
    printed = ""
    for i, (language, info, content) in enumerate(blocks(page)):
        if language in ("python", "bash") and not not_run(info):
            capsys.readouterr()
            if file := re.search(r'title="(\w+\.py)"', info):  # a script that a later block runs
                Path(file[1]).write_text(content, encoding="utf-8")
            elif language == "python":
                run_python(content, f"{page}, block {i}", namespace)
            else:
                run_bash(content)
            printed = capsys.readouterr().out
        elif language == "text":  # what the block above it prints
            assert same_text(printed, content), f"{page}, block {i}: printed\n{printed}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, demo_files, capsys):
    run_page(page, capsys)


def test_blocks_that_are_not_run_are_listed():
    found = {page: [text.splitlines()[0] for _, info, text in blocks(page) if not_run(info)] for page in PAGES}
    assert {page: lines for page, lines in found.items() if lines} == NOT_RUN


def test_every_block_says_what_it_is():
    for page in PAGES:
        for language, _, text in blocks(page):
            assert language in ("python", "bash", "text", "yaml", "json"), f"{page}: {text[:60]}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    from run_notebooks import run

    assert run(path, tmp_path).exists()


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    for path in NOTEBOOKS:
        assert (tmp_path / "notebooks" / f"{path.stem}.html").exists()
    for page in tmp_path.rglob("*.html"):  # nothing is loaded from the network
        text = page.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', text) == [], page
        assert "not run in tests" not in text, page
    assert not list(tmp_path.rglob("*.pyc"))


def test_the_tables_are_those_of_the_kept_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import make_tables

    text = "".join(page.read_text(encoding="utf-8") for page in make_tables.PAGES)
    assert make_tables.fill(text) == text
    assert set(re.findall("<!-- table: (.+?) -->", text)) == set(make_tables.TABLES)


def test_tables_of_a_gpu_show_each_kind_of_cells_and_no_failure(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import make_tables

    step = {"size": "19M", "way": "packed", "mfu": 0.2, "cells_per_second": 5.0, "peak_gb": 3.0}
    steps = [{**step, "cells": cells, "tokens_per_second": speed} for cells, speed in (("mix", 10), ("1,024", 20))]
    rows = make_tables.gpu({"steps": [*steps, {"size": "19M", "cells": "mix", "way": "cuDNN", "skipped": "…"}]})
    assert [row.split(" | ")[::2][:2] for row in rows.splitlines()[2:]] == [
        ["| 19M, cells of 1,024 tokens", "20"],
        ["| 19M", "10"],
    ]
    speeds = {"forward_tflops": 1.5, "both_tflops": 2.5}
    rows = make_tables.gpu_attention({"attention": {"sdpa, 8 x 64": speeds, "cuDNN, 8 x 64": {"failed": "…"}}})
    assert rows.splitlines()[2:] == ["| sdpa, 8 heads of 64 | 1.5 | 2.5 |"]
    ways = {"8 workers": 1, "8 workers, compiled": 2}
    rows = make_tables.gpu_loader(
        {"loader": {way: {"tokens_per_second": n, "data_wait_share": 0.5} for way, n in ways.items()}}
    )
    assert rows.splitlines()[2:] == ["| 8 | 1 | 50.0 % |", "| 8, compiled | 2 | 50.0 % |"]
