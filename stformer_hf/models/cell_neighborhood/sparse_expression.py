"""Expression of cells without its zeros, and a linear layer that reads it."""

from typing import Any, NamedTuple

import torch
from torch import nn


class SparseRows(NamedTuple):
    """Expression of N cells without its zeros, as in a CSR matrix (N, G)."""

    indptr: torch.Tensor  # int32 (N + 1,): cell i has the values `indptr[i]:indptr[i + 1]`
    genes: torch.Tensor  # int32 (E,), each gene at most once in a cell
    values: torch.Tensor  # float32 (E,)

    def log1p(self) -> "SparseRows":
        """Return log1p of all values; that of the zeros is 0."""
        return SparseRows(self.indptr, self.genes, self.values.log1p())  # torch 2.6 cannot compile `_replace`

    def to_dense(self, n_genes: int) -> torch.Tensor:
        """Return the values as a float32 Tensor (N, n_genes)."""
        zeros = self.values.new_zeros(len(self.indptr) - 1, n_genes)
        return zeros.index_put((_rows_of(self.indptr, self.genes).long(), self.genes.long()), self.values)


def _rows_of(indptr: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the row of each value of a CSR matrix, in the dtype of its columns."""
    rows = torch.arange(len(indptr) - 1, device=columns.device, dtype=columns.dtype)
    return torch.repeat_interleave(rows, indptr.diff(), output_size=len(columns))


class _SparseProduct(torch.autograd.Function):
    """CSR matrix (N, G) @ table (G, d).

    The gradient of the table is the product of the transposed matrix and the gradient of the result: on a CPU, sorting
    the values by column for it takes half the time of the gradient of `embedding_bag`.
    """

    @staticmethod
    def forward(
        ctx: Any, table: torch.Tensor, indptr: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(table, indptr, columns, values)
        return _sum_rows(table, indptr, columns, values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, torch.Tensor | None]:
        table, indptr, columns, values = ctx.saved_tensors
        rows = _rows_of(indptr, columns)
        ordered, order = columns.sort(stable=True)
        each = torch.arange(len(table) + 1, device=columns.device, dtype=columns.dtype)
        cuts = torch.searchsorted(ordered, each).to(columns.dtype)
        of_table = _sum_rows(gradient.contiguous(), cuts, rows.index_select(0, order), values.index_select(0, order))
        of_values = (table[columns] * gradient[rows]).sum(-1) if ctx.needs_input_grad[3] else None
        return of_table, None, None, of_values


def _sum_rows(table: torch.Tensor, indptr: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return nn.functional.embedding_bag(
        columns, table, indptr, per_sample_weights=values, mode="sum", include_last_offset=True
    )


class ExpressionLinear(nn.Linear):
    """Linear layer that also reads `SparseRows`: sums of value x column of the weight, in float32 or float64."""

    def forward(self, expression: torch.Tensor | SparseRows) -> torch.Tensor:
        """Map expression, dense or sparse (N, in_features), to (N, out_features)."""
        if not isinstance(expression, SparseRows):
            return super().forward(expression)
        if type(self.weight) not in (nn.Parameter, torch.Tensor):  # quantised: dense products only
            return super().forward(expression.to_dense(self.in_features).to(self.weight.dtype))
        indptr, genes, values = expression
        table = self.weight.t().to(torch.promote_types(self.weight.dtype, torch.float32)).contiguous()
        sums = _SparseProduct.apply(table, indptr, genes, values.to(table.dtype))
        return (sums + self.bias).to(self.weight.dtype)
