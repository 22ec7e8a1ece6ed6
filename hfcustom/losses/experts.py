"""Terms for mixtures of experts: what keeps their routers balanced and their logits small.

router logits (B * T, E) of each of L layers -> a value a row of data, or a token. Padding takes no part.
Letters: B rows of a tensor, R rows of data, T text tokens, S tokens that are no padding, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hfcustom.losses.chunked import accumulation_dtype
from hfcustom.losses.context import LossContext, mean_rows
from hfcustom.losses.contract import count_rows, real_tokens, row_ids, term
from hfcustom.naming import unknown

EXPERTS_PER_TOKEN = ("moe_k", "moe_topk", "num_experts_per_tok", "num_experts_per_token", "top_k_experts")
SCORES = ("sigmoid", "softmax")


@term(count="rows", outputs=("router_logits",))
def moe_balance(
    context: LossContext, top_k: int | None = None, scores: str = "softmax"
) -> tuple[torch.Tensor, float | torch.Tensor]:
    """E * sum_i f_i P_i for each row of data, averaged over layers: 1 when the row's tokens share the experts evenly.

    f_i is the share of the row's (token, one of its top K) pairs that chose expert i, which has no gradient; P_i is the mean
    over the row's tokens of i's score, which sums to 1 over experts: softmax(logits), or with scores="sigmoid" the
    sigmoids over their sum. The sequence-wise balance of DeepSeek-V3, https://arxiv.org/abs/2412.19437, eq. 17-20, which is
    that of the Switch Transformer, https://arxiv.org/abs/2101.03961, eq. 4-6, within each row. Switch's own is over a whole
    batch: no sum over rows, it would change with the cut of a step. K comes from the model's config, or `top_k`.

    >>> from types import SimpleNamespace
    >>> logits = torch.tensor([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0], [1.0, 3.0]]).log()  # p = 3/4 for the chosen expert
    >>> batch = {"labels": torch.zeros(2, 2, dtype=torch.long)}  # two rows of two tokens
    >>> context = SimpleNamespace(router_logits=(logits,), batch=batch)
    >>> moe_balance(context, top_k=1)  # 2 * (1 * 3/4 + 0 * 1/4) = 1.5, and 2 * (1/2 * 1/2 + 1/2 * 1/2) = 1
    (tensor(2.5000), 2)
    """
    rows, num_rows = row_ids(context.batch)[real_tokens(context.batch)], count_rows(context.batch)  # (S,)
    layers = []
    for logits in _real_logits(context):
        experts = logits.shape[-1]
        chosen = logits.topk(_experts_per_token(context, top_k, experts), -1).indices  # (S, K)
        pairs = torch.zeros_like(logits).scatter_(1, chosen, 1 / chosen.shape[-1])  # (S, E)
        place = rows.to(logits.device)
        shares = mean_rows(pairs.detach(), place, num_rows)  # (R, E)
        mean_scores = mean_rows(_scores(logits, scores), place, num_rows)  # (R, E)
        layers.append(experts * (shares * mean_scores).sum())
    return torch.stack(layers).mean(), num_rows


@term(count="all_tokens", outputs=("router_logits",))
def router_z_loss(context: LossContext) -> tuple[torch.Tensor, float | torch.Tensor]:
    """logsumexp(router logits)^2 of each token that is no padding, averaged over layers; use a weight near 1e-3.

    ST-MoE, https://arxiv.org/abs/2202.08906, eq. 5.

    >>> from types import SimpleNamespace
    >>> logits = torch.tensor([[3.0, 1.0], [0.5, 0.5]]).log()
    >>> batch = {"labels": torch.zeros(1, 2, dtype=torch.long)}
    >>> router_z_loss(SimpleNamespace(router_logits=(logits,), batch=batch))  # log(3 + 1)^2 = 1.9218, log(1)^2 = 0
    (tensor(1.9218), 2)
    """
    layers = [logits.logsumexp(-1).square().sum() for logits in _real_logits(context)]
    return torch.stack(layers).mean(), int(real_tokens(context.batch).sum())


def _real_logits(context: LossContext) -> Iterator[torch.Tensor]:
    """Yield each layer's logits of the tokens that are no padding, (S, E), float32 or better."""
    keep = real_tokens(context.batch).flatten()  # (B * T,)
    for logits in context.router_logits:
        yield logits[keep.to(logits.device)].to(accumulation_dtype(logits))


def _scores(logits: torch.Tensor, scores: str) -> torch.Tensor:
    if scores not in SCORES:
        raise ValueError(unknown("scores of moe_balance:", scores, SCORES, "Take what the model's router uses."))
    if scores == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)


def _experts_per_token(context: LossContext, top_k: int | None, experts: int) -> int:
    """Return K: the option, or what the text config calls by one of the names of EXPERTS_PER_TOKEN."""
    if top_k is None:
        facts = vars(context.model.config.get_text_config())
        found = [facts[name] for name in EXPERTS_PER_TOKEN if facts.get(name) is not None]
        if len(found) != 1:
            raise ValueError(
                f"The config of {context.model.stock_class().__name__} gives {len(found)} of "
                f"{', '.join(EXPERTS_PER_TOKEN)}, which say how many experts a token chooses; say so in the loss: "
                "{'moe_balance': {'top_k': 2}}."
            )
        top_k = found[0]
    if not 1 <= top_k <= experts:
        raise ValueError(f"moe_balance has top_k={top_k}; the router chooses among {experts} experts: 1 to {experts}.")
    return top_k
