"""Prior for a masked gene from the ranked genes of its cell, without training: its rank, and the genes beside it."""

import torch
from torch import nn

from .configuration_gene_bert import GeneBertConfig
from .packed_attention import segments_of

LEVEL_UNIT = 2.0**-20  # unit of `level`; integers stay exact when the weights are cast to half precision
N_BINS = 4096

_WINDOW = 12  # number of tokens read on either side
_COUNTS = 16  # number of most likely counts per token
_TIE = 10  # levels that differ by at most this are equal, in units
_STRAY = 1e-3  # weight of a token that is out of order: a random gene put there by masking
_FLOOR = 0.03  # share of the prediction that ignores the ranks
_SHOWN = 0.02  # factor for a gene that the cell already shows: one of the two is random
_LEAST_FACTOR = 0.05  # smallest factor from the other genes of the cell
_PLACES_AT_A_TIME = 512


class RankPrior(nn.Module):
    """Log odds of each gene at a rank, against its frequency, from the other genes of the cell.

    There are two parts. The first reads the ranks and knows no biology. A cell is sorted by count / median: a gene
    with count c has the level ln c - ln median, and levels descend along the cell. The counts are not visible, but few
    are likely, and most of these would be out of order: a recursion over the nearest tokens on either side sums over
    those that are in order. The second part reads which genes the cell shows, regardless of their ranks, through a
    correspondence analysis of training cells.

    A visible gene is penalised, since each gene occurs once. A token without levels (special tokens, phenotypes, genes
    of an extended vocabulary) is ignored: logits at its position, and its own logits, are unchanged.

    Attributes
    ----------
    token : int32 Tensor (n,)
        Token of a gene, ascending; the likely counts of each gene, the most likely first.
    level : int32 Tensor (n,)
        ln count - ln median, in units of 2 ** -20.
    bin : int32 Tensor (n,)
        Bin of the level among 4,096 bins of equal mass (frequency of the gene x share), 0 is the highest.
    share : Tensor (n,)
        Share of this count among the counts of the gene in cells that have it as a token.
    axes : Parameter (n_tokens, n_axes)
        Coordinates of the genes, initially standard coordinates; 0 for other tokens.

    Notes
    -----
    This is a forward-backward recursion of a hidden Markov model (Rabiner 1989) whose states are counts, over windows
    instead of whole cells. From the left, far to near, with a the weights of the previous states and a_0 that of no
    state: a'_c = share_c (a_0 + sum of a_i with level_i >= level_c); older states are kept, multiplied by (1 - the sum
    of the token's shares + 0.001). F(b) is the weight of the states from the left at or above bin b times that of
    those from the right at or below it. The log odds are ln(0.97 r / z + 0.03), where z is the mean of F over the
    bins, and r = sum over the gene's counts of share x F(bin), plus (1 - the sum of the shares) x z, so that z is the
    mean of r weighted by the genes' frequencies. ln(1 + axes_g . p) is added, where p is the mean of the axes of the
    visible genes: the reconstitution and the transition formula of correspondence analysis (Greenacre 1984);
    1 + axes_g . p is at least 0.05.

    `stformer_hf.training.starts.masked_gene_start` estimates both parts from training cells. The axes are then
    trained; the first part is not.
    """

    def __init__(self, config: GeneBertConfig):
        super().__init__()
        assert config.rank_prior_sizes is not None
        n_levels, n_tokens, n_axes = config.rank_prior_sizes
        self.n_types = config.type_vocab_size
        for name in ("token", "level", "bin"):
            self.register_buffer(name, torch.full((n_levels,), -1, dtype=torch.int32))
        self.register_buffer("share", torch.zeros(n_levels))
        self.axes = nn.Parameter(torch.zeros(n_tokens, n_axes))

    def forward(
        self,
        logits: torch.Tensor,
        input_ids: torch.LongTensor | None,
        token_type_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        cu_seq_lens: torch.Tensor | None = None,
        labelled: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add the log odds to logits.

        Parameters
        ----------
        logits : Tensor (batch, length, vocab_size) or (k, vocab_size)
            Logits of all positions, or of the labelled ones in row-major order.
        input_ids, token_type_ids : LongTensor (batch, length)
            A gene is compared with genes of its cell that have the same token type.
        attention_mask : Tensor (batch, length), optional
            Tokens that are not attended to are not read.
        cu_seq_lens : int32 Tensor (n_cells + 1,), optional
            Boundaries of the cells of a packed batch.
        labelled : LongTensor (n_labelled,), optional
            The labelled positions, if logits are not of all.

        Returns
        -------
        Tensor
            Logits with the shape and dtype of `logits`.

        Raises
        ------
        ValueError
            `input_ids` are missing.
        """
        if input_ids is None:
            raise ValueError("The model reads the order of the genes (rank_prior_sizes): pass input_ids.")
        device, (n_rows, length) = logits.device, input_ids.shape
        vocab_size = logits.shape[-1]
        ids, types = input_ids.to(device), token_type_ids.to(device)
        if cu_seq_lens is None:
            n_cells, cells = n_rows, torch.arange(n_rows, device=device)[:, None].expand(n_rows, length)
        else:
            n_cells, cells = cu_seq_lens.shape[0] - 1, segments_of(cu_seq_lens.to(device), length).long()
        if attention_mask is not None:
            ids = ids.masked_fill(attention_mask.to(device) == 0, vocab_size)
        ids, groups = ids.flatten(), (cells * self.n_types + types).flatten()
        places = torch.arange(n_rows * length, device=device)
        if labelled is not None:
            places = places[labelled.to(device)]
        flat = logits.reshape(-1, vocab_size)
        with torch.autocast(device.type, enabled=False):
            starts = torch.searchsorted(self.token, torch.arange(vocab_size + 2, device=device, dtype=torch.int32))
            shares = torch.zeros(vocab_size, device=device)
            shares.index_add_(0, self.token.clamp(min=0).long(), self.share.float())
            shown = torch.zeros(n_cells * self.n_types, vocab_size + 1, device=device)
            shown[groups, ids] = 1.0
            n_shown = (shown[:, :-1] @ (starts[1:-1] > starts[:-2]).float()).clamp(min=1)
            axes = nn.functional.pad(self.axes.float(), (0, 0, 0, vocab_size - len(self.axes)))
            points = shown[:, :-1] @ axes / n_shown.unsqueeze(1)
            penalty = torch.where(shown > 0, _SHOWN, 1.0)
            parts = []
            for some, of in zip(places.split(_PLACES_AT_A_TIME), flat.split(_PLACES_AT_A_TIME), strict=True):
                with torch.no_grad():
                    odds = self._order_odds(ids, groups, some, starts, 1 - shares)
                    # The token at the position itself is not a second occurrence.
                    odds *= penalty[groups[some]].scatter_(1, ids[some].unsqueeze(1), 1.0)[:, :-1]
                beside = torch.addmm(axes.new_ones(1), points[groups[some]], axes.T).clamp(min=_LEAST_FACTOR)
                parts.append(of + (beside * odds).log().to(of.dtype))
        return torch.cat(parts).view(logits.shape)

    def _order_odds(
        self,
        ids: torch.Tensor,
        groups: torch.Tensor,
        places: torch.Tensor,
        starts: torch.Tensor,
        rest: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the odds of every token at `places` (k,) from the order of the genes: float32 (k, vocab_size).

        `ids` and `groups` (n_tokens,) are the tokens of all cells, `vocab_size` where not attended to, and the group
        (cell and type) of each; `starts` (vocab_size + 2,) the start of the levels of each token; `rest` (vocab_size,)
        1 - the sum of the shares of its counts.
        """
        likely = self._beside(ids, groups, places, starts, -1) * self._beside(ids, groups, places, starts, 1)
        likely *= (1 - _FLOOR) / likely.mean(1, keepdim=True)  # before there are k x vocab_size numbers
        odds = nn.functional.embedding_bag(
            self.bin.long(), likely.T.contiguous(), starts[:-2], mode="sum", per_sample_weights=self.share.float()
        )
        return odds.T.add_(_FLOOR + (1 - _FLOOR) * rest)

    def _beside(
        self, ids: torch.Tensor, groups: torch.Tensor, places: torch.Tensor, starts: torch.Tensor, side: int
    ) -> torch.Tensor:
        """Compute the likelihood of the tokens on one side, for a gene in each bin, float32 Tensor (k, N_BINS)."""
        steps = torch.arange(_WINDOW, 0, -1, device=ids.device) * side  # from the farthest to the nearest
        around = places[:, None] + steps
        inside = (around >= 0) & (around < ids.shape[0])
        around = around.clamp(0, ids.shape[0] - 1)
        inside &= groups[around] == groups[places][:, None]
        tokens = torch.where(inside, ids[around], starts.shape[0] - 2)
        entries = starts[tokens].unsqueeze(-1) + torch.arange(_COUNTS, device=ids.device)
        known = entries < starts[tokens + 1].unsqueeze(-1)
        entries = entries.clamp(max=len(self.level) - 1)
        share = self.share.float()[entries] * known
        level = self.level[entries] * -side  # descends from the farthest to the nearest
        older = 1 - share.sum(-1) + _STRAY
        weight, none = torch.zeros_like(share), share.new_ones(places.shape[0])
        for step in range(_WINDOW):
            above = level[:, :step].flatten(1)[:, None] >= level[:, step].unsqueeze(-1) - _TIE
            before = torch.einsum("kce,ke->kc", above.float(), weight[:, :step].flatten(1))
            new = share[:, step] * (none[:, None] + before)
            stays = older[:, step]
            total = new.sum(1) + stays * (none + weight[:, :step].sum((1, 2)))
            weight[:, :step] *= (stays / total)[:, None, None]
            weight[:, step] = new / total[:, None]
            none = none * stays / total
        bins = weight.new_zeros(places.shape[0], N_BINS)
        bins.scatter_add_(1, self.bin[entries].long().flatten(1), weight.flatten(1))
        bins = bins.cumsum(1) if side < 0 else bins.flip(1).cumsum(1).flip(1)
        return bins + none[:, None] + 1e-12  # tokens without any order: no information
