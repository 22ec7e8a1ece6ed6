"""Token reduction between connector and language model: modules with `forward` and `num_tokens_out`.

(P, N, D) -> (P, M, D), M = num_tokens_out(N). A connector named in a config sits behind the family's own projector (whose
pretrained weights stay in use), sees one image crop a row, and is saved and trained with the model; the processor then
writes M placeholders where it wrote N (`model.match_processor`).
Letters: P crops, N tokens in, M tokens out, D hidden.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from hfcustom.naming import check_shape, snake_case, unknown

Grid = tuple[int, int]  # rows, columns
ConnectorClass = TypeVar("ConnectorClass", bound=type[nn.Module])


def connector(module_class: ConnectorClass) -> ConnectorClass:
    """Register a module class under its snake_case name (PairPool -> "pair_pool").

    Its __init__ takes (hidden_size, **options), its forward (P, N, D) -> (P, M, D), its num_tokens_out(N) returns M.
    Raises TypeError for a missing method, ValueError when the name belongs to another class.
    """
    for method in ("forward", "num_tokens_out"):
        if not callable(getattr(module_class, method, None)):
            raise TypeError(f"{module_class.__name__} needs a method {method}() to be a connector.")
    name = snake_case(module_class.__name__)
    taken = CONNECTORS.get(name)
    if taken is not None and _origin(taken) != _origin(module_class):
        raise ValueError(f"The connector name {name!r} belongs to {_origin(taken)}; rename {_origin(module_class)}.")
    CONNECTORS[name] = module_class
    return module_class


def _origin(module_class: Callable[..., nn.Module]) -> str:
    return f"{module_class.__module__}.{module_class.__qualname__}"


def build_connector(spec: str | Mapping[str, Any], hidden_size: int) -> nn.Module:
    """Build the module that a config names: "average_pool" or {"name": "average_pool", "size": 2}.

    Raises ValueError naming an unknown connector or option and the nearest known one.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name")
    if name not in CONNECTORS:
        cure = "Import the file that registers your own with @hfcustom.connector before loading."
        raise ValueError(unknown("connector", name, CONNECTORS, cure))
    known = list(inspect.signature(CONNECTORS[name]).parameters)[1:]
    for option in options:
        if option not in known:
            raise ValueError(unknown(f"option of connector {name!r}:", option, known))
    return CONNECTORS[name](hidden_size, **options)


def takes_grid(module: nn.Module) -> bool:
    """Whether a connector wants to know how its tokens lie: `forward(features, grid)`, `num_tokens_out(n, grid)`."""
    return "grid" in inspect.signature(module.forward).parameters


def reduce_tokens(module: Any, features: torch.Tensor, grid: Grid | None, name: Any) -> torch.Tensor:
    """Run a connector on crops of one size: (P, N, D) -> (P, M, D); ValueError when M is not what it said."""
    known = {"grid": grid} if grid is not None and takes_grid(module) else {}
    reduced: torch.Tensor = module(features, **known)
    expected = torch.Size((len(features), count_tokens_out(module, features.shape[1], grid), features.shape[2]))
    check_shape(f"connector {name!r}", reduced, expected, "(crops, num_tokens_out, hidden size)")
    return reduced


def count_tokens_out(module: Any, num_tokens: int, grid: Grid | None = None) -> int:
    """Return how many tokens a connector makes of `num_tokens`, which lie in `grid` (rows, columns) where that is known."""
    known = {"grid": grid} if grid is not None and takes_grid(module) else {}
    return int(module.num_tokens_out(num_tokens, **known))


def grid_out(module: Any, num_tokens: int, grid: Grid) -> Grid:
    """Return how the tokens lie that a connector makes: its own grid_out(grid), else all in one row."""
    if callable(getattr(module, "grid_out", None)):
        rows, columns = module.grid_out(grid)
        return rows, columns
    return 1, count_tokens_out(module, num_tokens, grid)


def grids_out(module: Any, grids: torch.Tensor, merge: int) -> torch.Tensor:
    """Return the grids of patches, (P, 3) frames, rows and columns, of which a family that merges `merge` x `merge` patches
    would make as many tokens as a connector makes, frame by frame, of those from `grids`."""
    found = []
    for frames, rows, columns in grids.tolist():
        given = rows // merge, columns // merge
        found.append((frames, *(merge * side for side in grid_out(module, math.prod(given), given))))
    return grids.new_tensor(found)


class AveragePool(nn.Module):
    """Average `size` x `size` neighbours of a square token grid, as Gemma 3's projector does before its product.

    No parameters; size=1 is the identity. Source: Gemma 3 report, https://arxiv.org/abs/2503.19786, section 2.
    """

    def __init__(self, hidden_size: int, size: int = 2) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"average_pool size={size}; it must be at least 1.")
        self.size = size

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        if self.size == 1:
            return features
        image = features.transpose(1, 2).unflatten(2, grid or self._square(features.shape[1]))  # (P, D, rows, columns)
        pooled = nn.functional.avg_pool2d(image, self.size, ceil_mode=True, count_include_pad=False)
        return pooled.flatten(2).transpose(1, 2)  # (P, M, D)

    def num_tokens_out(self, num_tokens: int, grid: Grid | None = None) -> int:
        """Return (side / size)^2 of a square crop; a grid that size does not divide keeps smaller cells at its borders."""
        if self.size == 1:
            return num_tokens
        return math.prod(self.grid_out(grid or self._square(num_tokens)))

    def grid_out(self, grid: Grid) -> Grid:
        """Return the rows and columns after pooling."""
        return -(-grid[0] // self.size), -(-grid[1] // self.size)

    def _square(self, num_tokens: int) -> Grid:
        side = math.isqrt(num_tokens)
        if side**2 != num_tokens or side % self.size:
            raise ValueError(
                f"average_pool size={self.size} needs a square grid whose side it divides; got {num_tokens} tokens a crop."
            )
        return side, side


class PerceiverResampler(nn.Module):
    """Read any number of tokens into `num_queries` learned ones by cross-attention, in residual blocks.

    Source: Flamingo, https://arxiv.org/abs/2204.14198, section 3.1 (keys and values are tokens and queries together).
    """

    def __init__(self, hidden_size: int, num_queries: int = 64, num_layers: int = 2, num_heads: int = 8) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"perceiver_resampler num_heads={num_heads} does not divide the hidden size {hidden_size}."
            )
        self.queries = nn.Embedding(num_queries, hidden_size)
        self.blocks = nn.ModuleList(_PerceiverBlock(hidden_size, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        queries = self.queries.weight.expand(len(features), -1, -1)  # (P, M, D)
        for block in self.blocks:
            queries = block(queries, features)
        return self.norm(queries)

    def num_tokens_out(self, num_tokens: int) -> int:
        """Return the number of queries, whatever comes in."""
        return self.queries.num_embeddings


class _PerceiverBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_queries = nn.LayerNorm(hidden_size)
        self.norm_tokens = nn.LayerNorm(hidden_size)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.kv_proj = nn.Linear(hidden_size, 2 * hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(),
            nn.Linear(4 * hidden_size, hidden_size),
        )

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        normed = self.norm_queries(queries)  # (P, M, D)
        memory = torch.cat([self.norm_tokens(tokens), normed], 1)  # (P, N+M, D)
        q = self._heads(self.q_proj(normed))  # (P, heads, M, D/heads)
        k, v = (self._heads(x) for x in self.kv_proj(memory).chunk(2, -1))  # (P, heads, N+M, D/heads)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (P, M, D)
        queries = queries + self.o_proj(attended)
        return queries + self.mlp(queries)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


CONNECTORS: dict[str, Callable[..., nn.Module]] = {
    "average_pool": AveragePool,
    "perceiver_resampler": PerceiverResampler,
}
