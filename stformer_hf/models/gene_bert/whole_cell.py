"""The whole cell as one vector: sums over all of its genes, not only the tokens, in two views of its counts."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .configuration_gene_bert import GeneBertConfig
from .encoder_layers import weight_of

OVERDISPERSION = 100.0  # theta of the negative binomial of Lause, Berens and Kobak 2021
_TARGET_SUM = 1e4
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7, which export needs


class CellValues(NamedTuple):
    """Values of n cells with E entries, computed without absent genes.

    A gene is absent from a cell if it is hidden (masked, outside the view, dropped) or not measured. Neither its count
    nor its share enters a sum. A cell's depth, the total of its present genes divided by their share of the training
    cells' counts, estimates its total over all genes.
    """

    genes: torch.Tensor  # LongTensor (E,), the gene of each entry; entries of padding have gene 0
    offsets: torch.Tensor  # LongTensor (n,), the start of the entries of each cell
    hidden: torch.Tensor  # bool (E,), True for entries of hidden genes
    measured: torch.Tensor | None  # bool (n or 1, n_genes), genes measured in the cells' files; None for all
    log_values: torch.Tensor  # float32 (E,), ln(1 + 10,000 count / depth), 0 for hidden genes and padding
    counts: torch.Tensor  # float32 (E,), 0 for hidden genes and padding
    mu: torch.Tensor  # float32 (E,), expected count, depth * share; 0 for genes never seen in training or not measured
    depth: torch.Tensor  # float32 (n,)


class GeneStatistics(nn.Module):
    """Statistics of the genes in the training cells; saved in the checkpoint, never trained.

    Buffers
    -------
    shares : float32 (n_genes,)
        Share of each gene in all counts of the training cells. Genes with a share of 0 were never seen; they
        contribute neither to a cell nor to its total.
    means : float32 (2, n_genes)
        Mean of each gene over the training cells: of the log values, and of the Pearson residuals.
    n_cells : float32 ()
        Number of training cells; residuals are clipped at its square root.

    A new model has equal shares, means of 0 and an infinite number of cells; `initialise_from_store` sets them.
    """

    def __init__(self, config: GeneBertConfig):
        super().__init__()
        self.register_buffer("shares", torch.full((config.num_genes,), 1 / config.num_genes))
        self.register_buffer("means", torch.zeros(2, config.num_genes))
        self.register_buffer("n_cells", torch.tensor(torch.inf))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "GeneStatistics":
        """Apply `fn` but keep float32: in half precision the share of rare genes would become 0."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = getattr(self, name)
            if now.dtype != tensor.dtype:
                setattr(self, name, tensor.to(now.device))
        return self

    def measured(self, cells: "CellValues") -> torch.Tensor:
        """Return which genes contribute to cells, bool Tensor (n or 1, n_genes)."""
        known = (self.shares > 0)[None]
        return known if cells.measured is None else known & cells.measured

    @torch.no_grad()
    def forward(
        self,
        cell_genes: torch.LongTensor,
        cell_counts: torch.Tensor,
        cell_indptr: torch.LongTensor | None = None,
        measured_genes: torch.Tensor | None = None,
    ) -> CellValues:
        """Read the counts of cells.

        Parameters
        ----------
        cell_genes : LongTensor (n, E), or (1, E) with `cell_indptr`
            Gene indices, each at most once per cell.
        cell_counts : Tensor (n, E), or (1, E)
            Their counts; 0 for padding, -1 for a hidden gene, expressed or not.
        cell_indptr : LongTensor (n + 1,), optional
            Packed batches: cell i has the entries `cell_indptr[i]:cell_indptr[i + 1]`.
        measured_genes : bool Tensor (n or 1, n_genes), optional
            Genes that are measured in the cells' files; all by default.

        Returns
        -------
        CellValues

        Raises
        ------
        ValueError
            On a CPU: `cell_indptr` does not end where the entries do.
        """
        genes, shares = cell_genes.reshape(-1), self.shares
        at = torch.arange(genes.shape[0], device=genes.device)
        if cell_indptr is None:
            n_cells, length = cell_genes.shape
            offsets = torch.arange(n_cells, device=genes.device) * length
            cells = at.div(max(length, 1), rounding_mode="floor")
        else:
            if genes.device.type == "cpu" and not torch.compiler.is_compiling() and int(cell_indptr[-1]) != len(genes):
                raise ValueError(
                    f"cell_indptr ends at {int(cell_indptr[-1])}, but there are {len(genes)} counts. A packed batch "
                    "cannot be split along the first dimension: pad it."
                )
            offsets, n_cells = cell_indptr[:-1].long(), cell_indptr.shape[0] - 1
            cells = torch.searchsorted(cell_indptr[1:].long().contiguous(), at, right=True)
        shares_of = shares[genes]
        if measured_genes is not None:
            measured_genes = measured_genes.to(genes.device)
            shares_of = shares_of * measured_genes.expand(n_cells, -1)[cells, genes]
        counts, known = cell_counts.reshape(-1).float(), shares_of > 0
        hidden = (counts < 0) & known
        counts = counts.clamp(min=0) * known
        totals = torch.stack([counts, shares_of * hidden], dim=1)
        if cell_indptr is None:
            total, lost = totals.view(n_cells, length, 2).sum(1).unbind(1)
        else:
            total, lost = totals.new_zeros(n_cells, 2).index_add(0, cells, totals).unbind(1)
        with torch.autocast(genes.device.type, enabled=False):
            present = shares.sum() if measured_genes is None else measured_genes.float() @ shares
        # A cell without visible counts has no depth; 1 keeps the divisions below finite, and its values are 0.
        depth = torch.where(total > 0, total / (present - lost).clamp(min=1e-6), torch.ones_like(total))
        depths = depth[cells]
        log_values = torch.log1p(counts / depths * _TARGET_SUM)
        return CellValues(genes, offsets, hidden, measured_genes, log_values, counts, depths * shares_of, depth)


class CellEmbedding(nn.Module):
    """Two views of the whole cell, side by side, each centred by gene and scaled to one length.

    For each cell these are sums over its present genes g, with count x and depth d (see `CellValues`):

    first half   (ln(1 + 10,000 x / d) - mean of g) * first half of the embedding of g
    second half  (r(x) - mean of g) * second half of the embedding of g, with the Pearson residual
                 r(x) = (x - mu) / sqrt(mu + mu^2 / theta), mu = d * share of g, clipped at +- sqrt(n_cells)

    Genes that the cell does not express are included, with x = 0: the sum of their terms in the second view is a
    function of d alone, and is computed from the embeddings at each call, so that it is never stale. Absent genes
    contribute nothing. Each half is scaled to a mean square of 1.

    Notes
    -----
    Analytic Pearson residuals: Lause, Berens and Kobak 2021, Genome Biology 22:258; theta = 100.
    """

    def __init__(self, config: GeneBertConfig):
        super().__init__()
        self.genes = nn.Embedding(config.num_genes, config.hidden_size)
        self.statistics = GeneStatistics(config)

    def forward(self, cells: CellValues) -> torch.Tensor:
        """Embed cells: float32 Tensor (n, hidden)."""
        with torch.autocast(cells.genes.device.type, enabled=False):
            sums = self.view_sums(cells)
        return (sums / sums.square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt()).flatten(1)

    def view_sums(self, cells: CellValues) -> torch.Tensor:
        """Return the sums of both views before scaling, float32 Tensor (n, 2, hidden / 2)."""
        statistics = self.statistics
        with torch.no_grad():
            means, measured = statistics.means, statistics.measured(cells)
            bound = statistics.n_cells.sqrt()
            of_entries = means[:, cells.genes]
            log_weights = torch.where(cells.hidden, of_entries[0], cells.log_values)
            # -r(0), and r(x) = (x / mu - 1) * -r(0); both are 0 where mu is.
            below = torch.rsqrt(1 / cells.mu + 1 / OVERDISPERSION)
            residuals = (cells.counts / cells.mu.clamp(min=1e-30) - 1) * below
            residuals = torch.where(cells.hidden, of_entries[1], residuals.clamp(-bound, bound))
            # Replaces the term of this gene in the sum over all genes, expressed or not.
            changes = residuals + below.clamp(max=bound)
            below = torch.outer(1 / cells.depth, 1 / statistics.shares)
            below = below.add_(1 / OVERDISPERSION).rsqrt_().clamp_(max=bound)
            if cells.measured is not None:
                below = below * cells.measured
        weight = weight_of(self.genes).float()
        first, second = weight.chunk(2, dim=-1)
        of_logs, of_residuals = sum_by_cell(weight, cells, torch.stack([log_weights, changes])).unbind(1)
        of_logs = of_logs - (means[0] * measured) @ first
        of_residuals = of_residuals - (means[1] * measured) @ second - below @ second
        return torch.stack([of_logs, of_residuals], dim=1)


def sum_by_cell(weight: torch.Tensor, cells: CellValues, factors: torch.Tensor) -> torch.Tensor:
    """Sum factor x row of a table over the entries of each cell, with a separate factor per part of the row.

    The rows of the table (n_genes, v * d) have v parts; `factors` (v, E) are those of each part and of the E entries
    of n cells. Returns a Tensor (n, v, d).
    """
    n_parts, n_cells = factors.shape[0], cells.offsets.shape[0]
    # Part i of row g is row g * v + i of the same memory, viewed as a table of narrower rows.
    table = weight.reshape(weight.shape[0] * n_parts, -1)
    parts = torch.arange(n_parts, device=weight.device)
    rows = cells.genes * n_parts + parts[:, None]
    if _is_exporting():  # a padded batch, with operations that every runtime has
        picked = (table[rows] * factors[..., None]).view(n_parts, n_cells, -1, table.shape[1])
        return picked.sum(2).transpose(0, 1)
    offsets = (cells.offsets + parts[:, None] * cells.genes.shape[0]).reshape(-1)
    sums = nn.functional.embedding_bag(
        rows.reshape(-1), table, offsets, per_sample_weights=factors.reshape(-1), mode="sum"
    )
    return sums.view(n_parts, n_cells, -1).transpose(0, 1)


class WideHead(nn.Module):
    """Linear map of all genes of a cell to the classes: a logistic regression on genes.

    (ln(1 + 10,000 x / d) - mean of the gene) @ weight + bias, summed over the present genes of a cell; an absent gene
    contributes nothing, as if it had its mean.
    """

    def __init__(self, config: GeneBertConfig):
        super().__init__()
        self.genes = nn.Embedding(config.num_genes, config.num_labels)
        self.genes.begins_at_zero = True
        self.bias = nn.Parameter(torch.zeros(config.num_labels))

    def forward(self, cells: CellValues, statistics: GeneStatistics) -> torch.Tensor:
        """Map cells to float32 logits (n, num_labels)."""
        with torch.autocast(cells.genes.device.type, enabled=False):
            means, weight = statistics.means[0], weight_of(self.genes).float()
            values = torch.where(cells.hidden, means[cells.genes], cells.log_values)
            sums = sum_by_cell(weight, cells, values[None]).squeeze(1)
            return sums - (means * statistics.measured(cells)) @ weight + self.bias.float()
