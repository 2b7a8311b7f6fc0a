"""The rank scheme: a token id is a gene, and genes are in the order of their scores (STFormer, Geneformer)."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers.utils import logging

from .cell_counts import Cells, CountRows, keep, map_genes, row_sums
from .cell_vocabulary import CellVocabulary
from .gene_columns import describe, strip_version
from .gene_matcher import GeneMatcher
from .gene_order import Truncation, write_ranks
from .legacy_files import load_mapping
from .tokenized_cells import CellLayout, TokenizedCells
from .tokenizer_settings import FEW, SEPARATOR, TokenizerSettings

logger = logging.get_logger(__name__)

_SCALE = (1e-100, 1e100)  # medians and target sums whose scores neither overflow nor vanish


class RankEncoder(CellVocabulary):
    """Ranks the genes of cells."""

    words_first = True

    def __init__(self, settings: TokenizerSettings):
        if settings.separator not in (None, SEPARATOR) and not settings.neighborhood:
            raise ValueError("separator needs neighborhood=True.")
        medians, scale = read_medians(settings.medians)
        scale = settings.target_sum if settings.target_sum is not None else 1e4 if scale is None else scale
        if not _SCALE[0] <= scale <= _SCALE[1]:
            raise ValueError(f"target_sum must be a positive number, got {scale}.")
        settings.target_sum = float(scale)
        settings.medians = _check_medians(medians, settings.genes)
        self._some_without_median = bool(np.isnan(settings.medians).any())
        super().__init__(settings, settings.genes)
        self.gene_token_ids = self.expression_ids
        self.gene_types = ["cell", "neighborhood"][: 1 + settings.neighborhood]
        self._gene_of_id = np.full(len(self.tokens), -1)
        self._gene_of_id[self.expression_ids] = np.arange(len(settings.genes))

    @staticmethod
    def fit(
        store: Any, genes: list[str], *, medians: Any, bin_edges: Any, **others: Any
    ) -> tuple[list[str], dict[str, Any]]:
        """Return the genes of a store that have tokens, and the settings that follow from its cells."""
        medians, target_sum = read_medians(medians)
        values = _check_medians(medians, genes)
        known = np.flatnonzero(~np.isnan(values))
        # Bin edges are refused by the settings.
        settings = {"medians": values[known], "target_sum": target_sum, "bin_edges": bin_edges}
        return [genes[i] for i in known], settings

    def meaning(self) -> dict[str, Any]:
        """Return the settings that define the tokens, as saved."""
        medians = [None if median != median else median for median in self.settings.medians.tolist()]
        names = ("target_sum", "neighborhood", "separator", "add_cls", "add_eos")
        return {**super().meaning(), "medians": medians, **self.settings.select(*names)}

    def find(self, token: str, matcher: GeneMatcher) -> int | None:
        """Return the id of a token, or of a gene by another version of its id or a symbol; None if it is unknown."""
        found = self.ids.get(token)
        if found is None and (gene := matcher.find([token])[0]) >= 0:
            return int(self.expression_ids[gene])
        return found

    def gene_counters(self, genes: np.ndarray) -> np.ndarray:
        """Return the token ids of genes, int64 array (n,)."""
        return self.expression_ids[genes]

    def genes_of(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """Return the gene index of each gene token, int64 array (n,)."""
        return self._gene_of_id[input_ids]

    def check_text(self, ids: Sequence[int | None]) -> None:
        """Refuse text that is not a cell; the id of an unknown word is None."""
        if self.settings.neighborhood and self.settings.separator is None:
            raise ValueError(
                "Without a separator, text does not show where the neighbourhood begins: tokenize counts."
            )
        if None in ids:
            raise ValueError(
                f"{sum(i is None for i in ids)} of the {len(ids)} words of the text are neither genes nor tokens of "
                f"this tokenizer; the first is word {list(ids).index(None) + 1}."
            )

    def types_of_text(
        self, ids: Sequence[int], mask: int, separator: int | None, included: Sequence[str]
    ) -> list[int]:
        """Return the token types that the counts of a cell of these tokens would get.

        `mask` and `separator` are ids; a mask at the front stands for one of the `included` phenotypes.
        """
        category_of = {i: name for name, ids in self.phenotype_ids.items() for i in ids.values()}
        categories, special = list(self.phenotype_ids), set(self.special_ids.tolist())
        types, gene_type, n_phenotypes, in_front = [], self.gene_type, 0, True
        for i in ids:
            if i == mask and in_front and n_phenotypes < len(included):
                types.append(1 + categories.index(included[n_phenotypes]))
                n_phenotypes += 1
            elif i in category_of:
                types.append(1 + categories.index(category_of[i]))
                n_phenotypes += 1
            elif i in special and i != mask:
                gene_type += i == separator
                types.append(0)
            else:
                types.append(gene_type)
                in_front = False
        return types

    def encode(
        self, cells: Cells, column_genes: np.ndarray | None, layout: CellLayout, truncation: Truncation
    ) -> TokenizedCells:
        """Return the tokens of cells; `column_genes` are those of `map_genes`."""
        settings, parts, room = self.settings, [cells.rows], layout.room(truncation.max_length)
        assert settings.target_sum is not None  # completed by this encoder
        if settings.neighborhood:
            assert cells.neighborhood is not None  # `read_cells` refuses cells without one
            parts.append(cells.neighborhood)
            room = room // 2
        mapped = [map_genes(rows, column_genes) for rows in parts]
        usable = [self._usable(rows) for rows in mapped]
        random = truncation.how == "random"
        # Totals are over all columns; if no gene is left out, they equal the totals of the genes.
        pairs = zip(parts, usable, strict=True)
        all_totals = [None if some is rows and not random else row_sums(rows) for rows, some in pairs]
        if random:
            cell_ids = truncation.cell_ids(cells.ids, mapped[0])
            usable = [_subset(rows, room, cell_ids, truncation) for rows in usable]
        n_genes = [np.minimum(np.diff(rows.indptr), room) for rows in usable]
        ids, types, indptr, starts = layout.allocate(n_genes)
        for rows, totals, start in zip(usable, all_totals, starts, strict=True):
            write_ranks(ids, start, room, rows, totals, settings.medians, settings.target_sum, self.expression_ids)
        if settings.neighborhood:
            around = n_genes[1]
            at = np.arange(around.sum()) + np.repeat(starts[1] - np.cumsum(around) + around, around)
            types[at] = 1
        types += self.gene_type
        layout.fill(ids, types, indptr, starts)
        nothing = np.empty(0, np.int64)
        return TokenizedCells(ids, types, indptr, nothing, nothing)

    def _usable(self, rows: CountRows) -> CountRows:
        """Drop counts of 0, and genes without a median."""
        usable = rows.counts > 0
        if self._some_without_median:
            usable &= ~np.isnan(self.settings.medians)[rows.columns]
        if usable.all():
            return rows
        indptr, (genes, counts) = keep(usable, rows.indptr, rows.columns, rows.counts)
        return CountRows(indptr, genes, counts)


def _subset(rows: CountRows, room: np.ndarray, cell_ids: np.ndarray, truncation: Truncation) -> CountRows:
    """Drop genes of cells that are longer than their room."""
    indptr, genes, counts = rows
    chosen = np.ones(len(genes), bool)
    for cell in np.flatnonzero(np.diff(indptr) > room):
        part = slice(indptr[cell], indptr[cell + 1])
        chosen[part] = truncation.choose(room[cell], counts[part], genes[part], cell_ids[cell])
    indptr, (genes, counts) = keep(chosen, indptr, genes, counts)
    return CountRows(indptr, genes, counts)


# ---------------------------------------------------------------------- medians


def read_medians(medians: Any) -> tuple[Any, float | None]:
    """Return the medians in an object, and the target sum that they were estimated with, if it is known."""
    if medians is None:
        raise ValueError("The rank scheme needs medians: pass medians=estimate_gene_medians(store).")
    if isinstance(medians, (str, os.PathLike)):
        medians = load_mapping(medians)
    target_sum = getattr(medians, "target_sum", None)
    medians = getattr(medians, "medians", medians)  # a GeneStatistics
    if isinstance(medians, Mapping) and isinstance(medians.get("medians"), Mapping):  # a gene_medians.json
        medians, target_sum = medians["medians"], medians.get("target_sum")
    if isinstance(medians, Mapping):
        wrong = [value for value in medians.values() if isinstance(value, (str, list, dict))]
        if wrong:
            raise ValueError(f"Medians must be numbers, got {wrong[0]!r}: pass {{gene: median}}.")
    return medians, target_sum


def _check_medians(medians: Any, genes: Sequence[str]) -> np.ndarray:
    """Return one median per gene, float64 array (n_genes,); NaN where there is none."""
    hint = ""
    if isinstance(medians, Mapping):
        of = {strip_version(str(gene)): value for gene, value in medians.items()}
        n = sum(strip_version(gene) in of for gene in genes)
        if n < FEW * min(len(of), len(genes)):
            hint = f" {n} of {len(of)} medians belong to genes of the tokenizer: they are for {describe(of)}."
        medians = [of.get(strip_version(gene)) for gene in genes]
    if len(medians) != len(genes):
        raise ValueError(f"There are {len(medians)} medians for {len(genes)} genes.")
    values = np.array([np.nan if value is None else value for value in medians], np.float64)
    wrong = np.flatnonzero((values < _SCALE[0]) | (values > _SCALE[1]))
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} medians are not positive numbers, such as {values[wrong[0]]} of {genes[wrong[0]]}."
        )
    n_missing = int(np.isnan(values).sum())
    if n_missing == len(values):
        raise ValueError(f"None of the genes has a median. The genes are like {describe(genes)}.{hint}")
    if n_missing:
        logger.warning(f"{n_missing} of {len(values)} genes have no median, and never become tokens.{hint}")
    return values
