"""Spatial domains: cluster cells by their embeddings, and write the clusters into `obs`."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning

from .. import __version__
from ..genes.wrong_names import must_have

logger = logging.getLogger(__name__)

METHODS = ("kmeans", "leiden")
_N_DOMAINS = 10
_MOST_CELLS = 100_000  # above, k-means uses mini-batches
_BATCH_SIZE = 4096  # of mini-batch k-means


def spatial_domains(
    adata: AnnData,
    n_domains: int | None = None,
    *,
    use_rep: str = "X_neighborhood",
    method: str = "kmeans",
    resolution: float = 1.0,
    key_added: str = "domain",
    seed: int = 0,
) -> None:
    """Cluster the cells by their neighbourhoods, and write the clusters into `adata.obs[key_added]`.

    Parameters
    ----------
    adata : AnnData
        Cells with `obsm[use_rep]`.
    n_domains : int, optional
        Number of domains for k-means; 10 by default. Leiden chooses the number itself.
    use_rep : str, default: "X_neighborhood"
        Key of the embedding in obsm, made by `embed_neighborhoods`.
    method : {"kmeans", "leiden"}, default: "kmeans"
        scikit-learn's k-means, the best of 10 starts (with mini-batches above 100,000 cells); or leiden, with scanpy
        and igraph, on scanpy's graph of the 15 nearest cells, which is kept in the AnnData under
        `{key_added}_neighbors`; other graphs are not changed.
    resolution : float, default: 1.0
        Resolution of leiden: higher values give more domains. Ignored by k-means.
    key_added : str, default: "domain"
        Column of obs: a categorical of "0", "1", …, the largest domain first. The settings are written to
        `uns[key_added]`.
    seed : int, default: 0
        Random seed.

    Raises
    ------
    ValueError
        The embedding is missing, not finite, or the same for all cells; there are more domains than cells;
        `n_domains` is given for leiden; the method is unknown.
    ImportError
        Leiden is requested without scanpy and igraph.

    Notes
    -----
    If the embedding has fewer distinct values than domains, each value is a domain, and a warning is logged.
    """
    check_domains(method, n_domains)
    must_have(adata.obsm, "obsm", use_rep, " embed_neighborhoods makes an embedding of neighbourhoods.")
    embedding = np.asarray(adata.obsm[use_rep])
    if embedding.ndim != 2:
        raise ValueError(f"obsm[{use_rep!r}] has the shape {embedding.shape}; an embedding has one row per cell.")
    finite = np.isfinite(embedding).all(axis=1)
    if not finite.all():
        raise ValueError(f"{(~finite).sum()} of {len(finite)} cells have NaN or infinite values in obsm[{use_rep!r}].")
    if not (embedding != embedding[:1]).any():
        raise ValueError(
            f"obsm[{use_rep!r}] is the same for all {len(embedding)} cells: there are no domains. This happens if all "
            "neighbourhoods are empty: check patch_size and the units of the coordinates."
        )
    if method == "kmeans":
        labels = _kmeans(embedding, _N_DOMAINS if n_domains is None else int(n_domains), seed)
        settings = {}
    else:
        labels = _leiden(adata, use_rep, resolution, f"{key_added}_neighbors", seed)
        settings = {"resolution": resolution, "neighbors_key": f"{key_added}_neighbors"}
    _, numbers, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    places = np.argsort(np.argsort(-sizes, kind="stable"))
    adata.obs[key_added] = pd.Categorical.from_codes(places[numbers], [str(i) for i in range(len(sizes))])
    adata.uns[key_added] = {
        "method": method,
        "use_rep": use_rep,
        "n_domains": len(sizes),
        "seed": seed,
        "version": __version__,
        **settings,
    }


def check_domains(method: str, n_domains: int | None) -> None:
    """Check the arguments and requirements of `spatial_domains`, before long work; its errors are the same."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {' and '.join(METHODS)}.")
    if n_domains is not None and (n_domains != int(n_domains) or n_domains < 1):
        raise ValueError(f"n_domains={n_domains}: must be an integer of at least 1.")
    if method == "leiden":
        if n_domains is not None:
            raise ValueError("Leiden chooses the number of domains itself: leave n_domains out, and use resolution=.")
        try:
            import igraph  # noqa: F401
            import scanpy  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f'{error}. method="leiden" needs scanpy and igraph: pip install "scanpy[leiden]".'
            ) from error


def _kmeans(embedding: np.ndarray, n_domains: int, seed: int) -> np.ndarray:
    """Return the cluster of each cell: int array (n_cells,)."""
    if n_domains > len(embedding):
        raise ValueError(f"{n_domains} domains for {len(embedding)} cells: reduce n_domains.")
    if len(embedding) > _MOST_CELLS:
        means = MiniBatchKMeans(n_domains, batch_size=_BATCH_SIZE, n_init=10, random_state=seed)
    else:
        means = KMeans(n_domains, n_init=10, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # logged below
        labels = means.fit_predict(embedding)
    n_found = len(np.unique(labels))
    if n_found < n_domains:
        logger.warning(
            f"There are {n_found} domains instead of {n_domains}: the embedding has no more distinct values."
        )
    return labels


def _leiden(adata: AnnData, use_rep: str, resolution: float, neighbors_key: str, seed: int) -> np.ndarray:
    """Return the community of each cell: array (n_cells,) of str."""
    import scanpy as sc

    sc.pp.neighbors(adata, use_rep=use_rep, key_added=neighbors_key, random_state=seed)
    # In a separate AnnData, since leiden writes into obs and uns.
    graph = AnnData(obs=pd.DataFrame(index=adata.obs_names))
    graph.obsp["connectivities"] = adata.obsp[f"{neighbors_key}_connectivities"]
    sc.tl.leiden(
        graph,
        resolution=resolution,
        obsp="connectivities",
        flavor="igraph",
        n_iterations=2,
        directed=False,
        random_state=seed,
    )
    return graph.obs["leiden"].to_numpy()
