"""What each objective adds to a whole-cell model that begins at the spectral start, at equal time.

A tiny whole-cell GeneBert is started at the principal components of about 15,000 cells of blood and of fetal tissues
(their genes united by Ensembl id), and trained on them with each objective alone and with pairs, each time from the
same start and for as many minutes. The embedding of cells that no run has seen is scored by the accuracy of 15 nearest
neighbours and of a linear probe (logistic regression), each by the same five folds, and by the adjusted Rand index of
Leiden clusters at resolution 1.

On one machine: --blood, --fetal and --citeseq; --minutes are of CPU, one run after the other on one thread.

On two machines, if the one with the GPU has neither scanpy nor the data nor much time:

  here   --prepare FOLDER --blood ... --fetal ... --citeseq ...   what the runs need, as one archive
  there  --prepared FOLDER --device cuda --jobs 12 --embeddings FOLDER   --minutes are wall time; several runs at once
  here   --score FOLDER --output FILE   reads the embeddings of all archives there
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from anndata import AnnData
    from transformers import PreTrainedModel, TrainerControl, TrainerState

    from stformer_hf import CellStore, GeneTokenizer

SETTINGS: dict[str, Any] = {
    "size": "tiny",
    "max_length": 34,  # [CLS], 32 genes, [EOS]; [CLS] has the whole cell
    "learning_rate": 3e-4,
    "warmup_steps": 20,
    "batch": 64,  # cells
    "held_out_plates": 0.25,
    "least_cells": 20,  # of a fetal cell type, among the cells held out
    "resolution": 1.0,
}
# In the order of their worth, so that a benchmark that is cut short has the first.
RUNS = {
    f"{'+'.join(objectives)}{f':{view}' if view else ''}": (dict.fromkeys(objectives, 1.0), view)
    for objectives, view in [
        (["contrast"], "disjoint"),
        (["decode"], "disjoint"),
        (["cross_correlation"], "thinning"),
        (["mlm"], None),
        (["mlm", "contrast"], "disjoint"),
        (["contrast"], "thinning"),
        (["contrast", "decode"], "disjoint"),
        (["decode"], "thinning"),
        (["cross_correlation"], "disjoint"),
        (["mlm", "decode"], "disjoint"),
        (["decode", "cross_correlation"], "thinning"),
        (["mlm", "cross_correlation"], "thinning"),
        (["contrast", "cross_correlation"], "thinning"),
    ]
}
START = "step 0"
_ARCHIVE = "prepared.tar.xz"
_UNTIMED_STEPS = 3  # before the clock begins: the first steps load kernels and take memory
_PATIENCE = 180  # seconds that a run waits for those that begin with it
_FIGURES = ("contrast_of_totals", "effective_rank", "total_r2")
_SCORES = ("knn", "probe", "ari")


def run(arguments: list[str]) -> None:
    """Prepare, train or score, as the flags tell; without --prepare, --prepared and --score all of it here."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks objectives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--blood", help="h5ad of blood cells, var with ensembl_id (pbmc_ifnb.h5ad)")
    parser.add_argument("--fetal", help="h5ad of fetal cells, obs with batch and cell_type")
    parser.add_argument("--citeseq", help="10x h5 of genes and antibodies, for recipes/citeseq_types.py")
    parser.add_argument("--prepare", metavar="FOLDER", help=f"write {_ARCHIVE} there, and end")
    parser.add_argument("--prepared", metavar="FOLDER", help=f"train from {_ARCHIVE} there, and write --embeddings")
    parser.add_argument("--score", metavar="FOLDER", nargs="+", help="score the embeddings there, and end")
    parser.add_argument("--embeddings", metavar="FOLDER", default="benchmark_objectives_embeddings")
    parser.add_argument("--device", default="cpu", help="for --prepared: cpu or cuda")
    parser.add_argument("--jobs", type=int, default=1, help="for --prepared: runs at once, a process of a thread each")
    parser.add_argument("--workers", type=int, default=0, help="for --prepared: more processes per run, for its data")
    parser.add_argument("--minutes", type=float, default=15.0, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the split, of the start and of the folds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the order, the masks and the views")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="all by default")
    parser.add_argument(
        "--output", default="benchmark_objectives.json", help="JSON file; the table goes to .md beside"
    )
    args = parser.parse_args(arguments)
    if not (args.prepared or args.score) and not (args.blood and args.fetal):
        parser.error("give --blood and --fetal, or --prepared, or --score")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.score:
            _score_all(args)
        elif args.prepared:
            _run_prepared(args, Path(folder))
        elif args.prepare:
            _prepare(args, Path(folder))
        else:
            _run_here(args, Path(folder))


# ------------------------------------------------------------------ what the runs need


def _make(args: argparse.Namespace, folder: Path) -> tuple:
    """Make the store, the tokenizer, the model that all runs start from, and the labelled cells."""
    from transformers import set_seed

    from stformer_hf import GeneBertConfig, GeneBertForPhenotypicMLM, GeneTokenizer
    from stformer_hf.training.starts.spectral_start import initialise_from_store

    store, sets = _cells(args, folder)
    tokenizer = GeneTokenizer.from_store(store, whole_cell=True, max_length=SETTINGS["max_length"])
    set_seed(args.seed)
    config = GeneBertConfig.from_tokenizer(tokenizer, size=SETTINGS["size"], hidden_dropout_prob=0.0)
    start = GeneBertForPhenotypicMLM(config)
    initialise_from_store(start, tokenizer, store)
    return store, tokenizer, start, sets


def _cells(args: argparse.Namespace, folder: Path) -> tuple:
    """Make the store of the training cells, and the labelled cells to score on."""
    import anndata

    from stformer_hf import CellStore
    from stformer_hf.cli.demo import load_cells

    blood, fetal = anndata.read_h5ad(args.blood), anndata.read_h5ad(args.fetal)
    plates = np.unique(fetal.obs["batch"])
    n_out = round(len(plates) * SETTINGS["held_out_plates"])
    held_out = fetal.obs["batch"].isin(np.random.default_rng(args.seed).permutation(plates)[:n_out]).to_numpy()
    parts = []
    for cells in (blood, fetal[~held_out].copy()):
        cells.var_names = cells.var["ensembl_id"].astype(str)
        cells.obs = cells.obs[[]]
        parts.append(cells[:, ~cells.var_names.duplicated()].copy())
    store = CellStore.build(folder / "store", parts)
    demo = load_cells()[0]
    demo.obs["cell_type"] = demo.obs["bulk_labels"]
    sets = {"demo": demo, "fetal, plates held out": _of_common_types(fetal[held_out].copy())}
    if args.citeseq:
        sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
        from citeseq_types import labelled_cells

        sets["citeseq"] = labelled_cells(args.citeseq, folder)
    return store, sets


def _of_common_types(cells: AnnData) -> AnnData:
    """Choose the cells of types that are not too rare, by their Ensembl ids."""
    cells.var_names = cells.var["ensembl_id"].astype(str)
    cells = cells[:, ~cells.var_names.duplicated()]
    sizes = cells.obs["cell_type"].value_counts()
    return cells[cells.obs["cell_type"].isin(sizes[sizes >= SETTINGS["least_cells"]].index)].copy()


def _prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write store, tokenizer, start and labelled cells as one archive."""
    from anndata import AnnData

    _, tokenizer, start, sets = _make(args, folder)
    tokenizer.save_pretrained(folder / "start")
    start.save_pretrained(folder / "start")
    (folder / "labelled").mkdir()
    for i, (name, cells) in enumerate(sets.items()):
        bare = AnnData(cells.X, obs=cells.obs[["cell_type"]], var=cells.var.filter(["gene_symbol"]))
        bare.write_h5ad(folder / "labelled" / f"{i} {name}.h5ad")  # the archive is compressed
    archive = Path(args.prepare) / _ARCHIVE
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz", preset=1) as file:  # a higher one saves 4 MB and takes a minute
        for part in ("store", "start", "labelled"):
            file.add(folder / part, arcname=part)
    print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB")


@lru_cache(maxsize=1)
def _read_prepared(folder: Path) -> tuple:
    """Read what `_prepare` wrote, unpacked; the same as `_make` gives."""
    import anndata

    from stformer_hf import CellStore, GeneBertForPhenotypicMLM, GeneTokenizer

    files = sorted((folder / "labelled").glob("*.h5ad"))
    sets = {path.stem.partition(" ")[2]: anndata.read_h5ad(path) for path in files}
    start = GeneBertForPhenotypicMLM.from_pretrained(folder / "start", dtype=torch.float32)
    return CellStore(folder / "store"), GeneTokenizer.from_pretrained(folder / "start"), start, sets


# ------------------------------------------------------------------ training


def _run_here(args: argparse.Namespace, folder: Path) -> None:
    """Make all, and train and score one run after the other, by the time of the CPU."""
    store, tokenizer, start, sets = _make(args, folder)
    types = {name: cells.obs["cell_type"].astype(str).to_numpy() for name, cells in sets.items()}

    def scored(record: dict, model: PreTrainedModel) -> dict:
        states = _embed(model, tokenizer, sets, "cpu")
        return {**record, "scores": {name: score(states[name], types[name], args.seed) for name in sets}}

    runs = [scored(_step_0(store, tokenizer, args), start)]
    _write(args.output, runs)
    for name, seed in itertools.product(args.runs, args.seeds):
        model = copy.deepcopy(start)
        record = _train(model, tokenizer, store, name, seed, args, folder, clock=time.process_time)
        runs.append(scored(record, model))
        _write(args.output, runs)
    print(table(runs))


def _run_prepared(args: argparse.Namespace, folder: Path) -> None:
    """Train in waves of `--jobs` runs; each that ends is written at once, into the archive of its wave."""
    with tarfile.open(Path(args.prepared) / _ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    output = Path(args.embeddings)
    output.mkdir(parents=True, exist_ok=True)
    store, tokenizer, start, sets = _read_prepared(folder)
    states = _embed(start, tokenizer, sets, "cpu")
    labels = {f"labels/{name}": cells.obs["cell_type"].astype(str).to_numpy("U") for name, cells in sets.items()}
    _save(output / "step_0.zip", [(_step_0(store, tokenizer, args), {**states, **labels})])
    jobs = list(itertools.product(args.runs, args.seeds))
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that begin now; they last for all waves
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        for first in range(0, len(jobs), args.jobs):
            wave, ended = jobs[first : first + args.jobs], []
            together = manager.Barrier(len(wave))
            futures = [pool.submit(_run_one, args, folder, name, seed, together) for name, seed in wave]
            file = output / f"{wave[0][0].replace(':', '-').replace('+', '-')}_{wave[0][1]}_{len(wave)}.zip"
            for future in as_completed(futures):
                if (error := future.exception()) is not None:
                    print(f"A run failed: {error!r}", file=sys.stderr, flush=True)
                    continue
                ended.append(future.result())
                _save(file, ended)
                print(json.dumps(ended[-1][0]), flush=True)


def _run_one(
    args: argparse.Namespace, folder: Path, name: str, seed: int, together: threading.Barrier
) -> tuple[dict, dict]:
    """Make one run in a process of the pool; returns its record, and the embeddings."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if args.device == "cuda" else "highest")  # TF32
    store, tokenizer, start, sets = _read_prepared(folder)

    def wait() -> None:
        with suppress(threading.BrokenBarrierError):  # another run failed, or is late
            together.wait(_PATIENCE)

    with tempfile.TemporaryDirectory(dir=folder) as own:
        model = copy.deepcopy(start)
        record = _train(
            model,
            tokenizer,
            store,
            name,
            seed,
            args,
            Path(own),
            clock=time.perf_counter,
            wait=wait,
            device=args.device,
        )
    return record, _embed(model, tokenizer, sets, args.device)


def _step_0(store: CellStore, tokenizer: GeneTokenizer, args: argparse.Namespace) -> dict:
    """Say what all runs begin with."""
    about = {"cells": len(store), "genes": len(tokenizer.genes), "split_seed": args.seed, **SETTINGS}
    return {"run": START, "seed": args.seed, "steps": 0, "about": about}


def _train(
    model: PreTrainedModel,
    tokenizer: GeneTokenizer,
    store: CellStore,
    name: str,
    seed: int,
    args: argparse.Namespace,
    folder: Path,
    *,
    clock: Callable[[], float],
    wait: Callable[[], None] | None = None,
    device: str = "cpu",
) -> dict:
    """Train a model until the minutes are over, by a clock; returns what the logs say."""
    from transformers import TrainerCallback, TrainingArguments, set_seed

    from stformer_hf import DataCollatorForPhenotypicMLM, STFormerPretrainer, __version__

    class StopInTime(TrainerCallback):
        """Ends the training when its time is used up; the time begins when all runs of a wave are ready."""

        def on_step_end(self, args_: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            if state.global_step == _UNTIMED_STEPS:
                if wait is not None:
                    wait()
                self.began = clock()
            used = clock() - self.began if state.global_step >= _UNTIMED_STEPS else 0
            control.should_training_stop = used > 60 * args.minutes

        def on_train_end(self, *_: Any, **kwargs: Any) -> None:
            self.seconds = clock() - self.began

    set_seed(seed)
    objectives, view = RUNS[name]
    on_gpu = device == "cuda"
    settings = TrainingArguments(
        str(folder / "run"),
        max_steps=10**6,
        per_device_train_batch_size=SETTINGS["batch"],
        learning_rate=SETTINGS["learning_rate"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=SETTINGS["warmup_steps"],
        weight_decay=0.0,
        logging_steps=50 if on_gpu else 10,  # each log waits for the GPU
        logging_nan_inf_filter=not on_gpu,  # so does this, at each step
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not on_gpu,
        dataloader_pin_memory=False,
        dataloader_num_workers=args.workers,
        # Workers start again with each epoch. Forking them is quick; spawning, the default in a pool, takes seconds.
        dataloader_multiprocessing_context="fork" if args.workers else None,
        seed=seed,
    )
    stop = StopInTime()
    optional = {} if view is None else {"view": view}
    if "mlm" not in objectives:  # as with a probability of 0, and quicker
        optional["data_collator"] = DataCollatorForPhenotypicMLM(tokenizer, mlm=False, seed=seed)
    trainer = STFormerPretrainer(
        settings,
        store,
        model=model,
        processing_class=tokenizer,
        objectives=objectives,
        callbacks=[stop],
        **optional,
    )
    metrics = trainer.train().metrics
    if trainer.interrupted:
        raise SystemExit("Told to end (SIGTERM): the run has not had its time, and is left out.")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry] or [{}]
    told = [each for each in logs[0] if each.endswith("_loss") or each in _FIGURES]
    return {
        "run": name,
        "seed": seed,
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch, 2),
        "first": {each: logs[0][each] for each in told},
        "last": {each: logs[-1][each] for each in told if each in logs[-1]},
        "seconds": round(stop.seconds, 2),
        "of": "CPU" if clock is time.process_time else "wall time",
        "device": torch.cuda.get_device_name() if on_gpu else "one thread of a CPU",
        "data_wait_share": metrics.get("train_data_wait_share"),
        "versions": {each: version(each) for each in ("torch", "transformers")} | {"stformer_hf": __version__},
        "date": time.strftime("%Y-%m-%d"),
    }


def _embed(
    model: PreTrainedModel, tokenizer: GeneTokenizer, sets: dict[str, AnnData], device: str
) -> dict[str, np.ndarray]:
    """Embed the labelled cells."""
    from stformer_hf import embed

    for cells in sets.values():
        embed(cells, model, tokenizer=tokenizer, key_added="X", device=device)
    return {name: cells.obsm["X"] for name, cells in sets.items()}


def _save(file: Path, runs: list[tuple[dict, dict]]) -> None:
    """Write runs into an archive, whole or not at all: of each a record, and its arrays, in half precision."""
    new = file.with_suffix(".new")
    with zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
        for i, (record, arrays) in enumerate(runs):
            small = {name: of.astype(np.float16) if of.dtype == np.float32 else of for name, of in arrays.items()}
            np.savez(packed := io.BytesIO(), **small)
            archive.writestr(f"{i}.json", json.dumps(record))
            archive.writestr(f"{i}.npz", packed.getvalue())
    os.replace(new, file)


def _load(folders: list[str]) -> list[tuple[dict, dict]]:
    """Read the runs of all archives in some folders, step 0 first, then in the order of RUNS."""
    runs = {}
    for path in sorted(path for folder in folders for path in Path(folder).rglob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".json"):
                    record = json.loads(archive.read(name))
                    with np.load(io.BytesIO(archive.read(name.replace(".json", ".npz")))) as arrays:
                        runs[record["run"], record["seed"]] = record, dict(arrays)
    order = [START, *RUNS]
    return [runs[key] for key in sorted(runs, key=lambda key: (order.index(key[0]), key[1]))]


# ------------------------------------------------------------------ scores


def _score_all(args: argparse.Namespace) -> None:
    """Score the embeddings that runs wrote."""
    found = _load(args.score)
    if not found or found[0][0]["run"] != START:
        raise SystemExit(f"No archive of step 0 is in {', '.join(args.score)}: what the runs began with, and labels.")
    labels = {name.removeprefix("labels/"): of for name, of in found[0][1].items() if name.startswith("labels/")}
    runs = []
    for record, states in found:
        scores = {name: score(states[name].astype(np.float32), of, args.seed) for name, of in labels.items()}
        runs.append({**record, "scores": scores})
        _write(args.output, runs)
    print(table(runs))


def score(states: np.ndarray, types: np.ndarray, seed: int) -> dict:
    """Score the embeddings of labelled cells: accuracies by fold, the Rand index, and the effective rank."""
    import scanpy as sc
    from anndata import AnnData
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import adjusted_rand_score
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    from stformer_hf.training.objectives.watch import effective_rank

    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    cells = AnnData(obsm={"X": states})
    sc.pp.neighbors(cells, n_neighbors=15, use_rep="X", random_state=seed)
    sc.tl.leiden(
        cells,
        SETTINGS["resolution"],
        flavor="igraph",
        n_iterations=2,
        directed=False,
        random_state=seed,
        key_added="found",
    )
    return {
        "knn": cross_val_score(KNeighborsClassifier(15), states, types, cv=folds).tolist(),
        "probe": cross_val_score(LogisticRegression(max_iter=2000), states, types, cv=folds).tolist(),
        "ari": [float(adjusted_rand_score(types, cells.obs["found"]))],
        "effective_rank": effective_rank(torch.from_numpy(states)),
    }


def summary(runs: list[dict]) -> list[dict]:
    """Sum up the runs of each kind over their seeds.

    Parameters
    ----------
    runs : list of dict
        Records with scores, that of step 0 first.

    Returns
    -------
    list of dict
        For each kind its number of seeds, mean of steps, and of each set and score: mean, sd over seeds, and the
        difference to step 0: mean over seeds and folds, with the standard error over folds of the mean over seeds
        (of the one Rand index, over seeds). What one value would not tell is None.
    """
    rows = []
    for name in dict.fromkeys(record["run"] for record in runs):
        mine = [record for record in runs if record["run"] == name]
        row = {"run": name, "seeds": len(mine), "steps": float(np.mean([each["steps"] for each in mine])), "sets": {}}
        for of, before in runs[0]["scores"].items():
            rank = float(np.mean([each["scores"][of]["effective_rank"] for each in mine]))
            cells: dict[str, Any] = {"rank": rank}
            row["sets"][of] = cells
            for kind in _SCORES:
                values = np.array([each["scores"][of][kind] for each in mine])  # seeds, folds
                differences = values - before[kind]
                differences = differences.mean(0) if values.shape[1] > 1 else differences[:, 0]
                cells[kind] = {
                    "mean": float(values.mean()),
                    "sd": _sd(values.mean(1)),
                    "difference": float(differences.mean()),
                    "error": None if len(differences) < 2 else _sd(differences) / len(differences) ** 0.5,
                }
        rows.append(row)
    return rows


def _sd(values: np.ndarray) -> float | None:
    return None if len(values) < 2 else float(values.std(ddof=1))


def table(runs: list[dict]) -> str:
    """Write two tables in Markdown: the scores, the largest of each column in bold, and the differences to step 0."""
    rows = summary(runs)
    sets = list(rows[0]["sets"])
    best = {(of, kind): max(row["sets"][of][kind]["mean"] for row in rows) for of in sets for kind in _SCORES}

    def cell(row: dict, of: str, kind: str) -> str:
        found = row["sets"][of][kind]
        mean = f"**{found['mean']:.3f}**" if found["mean"] == best[of, kind] else f"{found['mean']:.3f}"
        return mean if found["sd"] is None else f"{mean} ± {found['sd']:.3f}"

    def difference(row: dict, of: str, kind: str) -> str:
        found = row["sets"][of][kind]
        return f"{found['difference']:+.3f}" + ("" if found["error"] is None else f" ± {found['error']:.3f}")

    def markdown(rows: list[dict], content: Callable[[dict, str], str]) -> str:
        lines = [
            f"| objectives | views | seeds | steps | {' | '.join(sets)} |",
            "|---" * (4 + len(sets)) + "|",
        ]
        for row in rows:
            objectives, _, view = row["run"].partition(":")
            start = [objectives.replace("+", " + "), view or "-", str(row["seeds"]), f"{row['steps']:.0f}"]
            lines.append(f"| {' | '.join([*start, *(content(row, of) for of in sets)])} |")
        return "\n".join(lines)

    scores = markdown(
        rows,
        lambda row, of: " / ".join(cell(row, of, kind) for kind in _SCORES) + f" ({row['sets'][of]['rank']:.0f})",
    )
    differences = markdown(rows[1:], lambda row, of: " / ".join(difference(row, of, kind) for kind in _SCORES))
    return f"{scores}\n\n{differences}"


def _write(output: str, runs: list[dict]) -> None:
    Path(output).write_text(json.dumps({"summary": summary(runs), "runs": runs}, indent=1))
    times = {(round(each["seconds"] / 60, 1), each["of"], each["device"]) for each in runs if "seconds" in each}
    note = "15-NN / linear probe / ARI (effective rank) of cells that no run has seen, mean and sd over seeds; "
    note += "; ".join(f"{minutes:g} minutes of {of} per run on {device}" for minutes, of, device in sorted(times))
    note += (
        ". Below, the differences to step 0 on the same folds: mean and its standard error over folds (of the ARI, "
    )
    note += "over seeds)."
    Path(output).with_suffix(".md").write_text(f"{note}\n\n{table(runs)}\n")
    print(json.dumps(runs[-1]), flush=True)
