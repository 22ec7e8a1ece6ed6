"""Terms for mixtures of experts: values against loops, routers that learn, and what cannot work is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, Family

import hfcustom
from hfcustom.families import load_family
from hfcustom.losses import find_loss
from hfcustom.parts import expert_matrices, unwrap
from hfcustom.train import checkpoint_activations

TERMS = ("moe_balance", "router_z_loss")


MOE = [name for name in FAMILIES if expert_matrices(Family(name, load_family(name)).model())]


@pytest.fixture(params=MOE)
def moe(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


def router_names(model: Any) -> list[str]:
    """Return the paths of the routers, which not each family calls so."""
    named = model.named_modules()
    return [name for name, module in named if name.endswith(".router") or type(module).__name__.endswith("Router")]


def recorded_routers(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return each router's logits, (B, T, E), from what hooks of our own see it get."""
    seen: list[torch.Tensor] = []
    routers = [model.get_submodule(name) for name in router_names(model)]
    hooks = [
        router.register_forward_pre_hook(lambda module, args: seen.append(args[0] @ module.weight.T))
        for router in routers
    ]
    model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [logits.reshape(*batch["labels"].shape, -1) for logits in seen]


def naive_balance(layers: list[torch.Tensor], mask: torch.Tensor, top_k: int) -> float:
    total = 0.0
    for logits in layers:
        for row, real in zip(logits, mask.bool(), strict=True):
            counts, probabilities = [0] * row.shape[-1], torch.zeros(row.shape[-1])
            for token in row[real]:
                for expert in sorted(range(len(token)), key=lambda at: -float(token[at]))[:top_k]:
                    counts[expert] += 1
                probabilities += token.exp() / token.exp().sum() / int(real.sum())
            shares = [count / (top_k * int(real.sum())) for count in counts]
            total += len(counts) * sum(share * float(p) for share, p in zip(shares, probabilities, strict=True))
    return total / len(layers)


def naive_z(layers: list[torch.Tensor], mask: torch.Tensor) -> float:
    return sum(float(layer.exp().sum(-1).log().pow(2)[mask.bool()].sum()) for layer in layers) / len(layers)


@torch.no_grad()
def test_values_equal_loops_over_rows_and_tokens(moe: Family) -> None:
    batch, model = moe.batch([1, 0, 0]), moe.model(loss=dict.fromkeys(TERMS, 1.0))
    layers = recorded_routers(model, batch)
    text = model.config.get_text_config()
    top_k = text.moe_topk if "moe_topk" in vars(text) else text.num_experts_per_tok
    assert len(layers) == len(expert_matrices(model)) / 2 > 0  # gate and up together, down
    model(**batch)
    values = model.loss_values
    mask = batch["attention_mask"]
    assert float(values["moe_balance"].sum) == pytest.approx(naive_balance(layers, mask, top_k), rel=1e-5)
    assert float(values["router_z_loss"].sum) == pytest.approx(naive_z(layers, mask), rel=1e-5)
    assert (values["moe_balance"].count, values["router_z_loss"].count) == (3, int(mask.sum()))


def test_perfect_balance_is_one_and_collapse_is_the_number_of_experts() -> None:
    batch = {"labels": torch.zeros(1, 4, dtype=torch.long)}
    for logits, expected in ((30 * torch.eye(4), 1.0), (30 * torch.eye(4)[[0] * 4], 4.0)):
        context: Any = SimpleNamespace(router_logits=(logits,), batch=batch)
        value, _ = find_loss("moe_balance").function(context, top_k=1)
        assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA"])
def test_gradients_arrive_and_checkpointing_changes_none(moe: Family, name: str, adapted: bool) -> None:
    batch, gradients = moe.batch([1, 0]), []
    for enable in (False, True):
        model = moe.model(loss=name).train()
        wrapped = hfcustom.lora(model, rank=2) if adapted else model
        if enable:
            checkpoint_activations(unwrap(wrapped))
        wrapped(**batch).loss.backward()
        gradients.append({key: p.grad for key, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()})
    routers = tuple(f"{name}.weight" for name in router_names(model))
    reached = [key for key in gradients[0] if ("lora_B" in key if adapted else key.endswith(routers))]
    assert reached and (adapted or len(reached) == len(expert_matrices(unwrap(wrapped))) / 2)
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-5, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", TERMS)
def test_logits_recorded_without_a_gradient_are_an_error(moe: Family, name: str) -> None:
    """Reentrant checkpointing records inside no_grad."""
    model = moe.model(loss={"cross_entropy": 1.0, name: 0.1}).train()
    checkpoint_activations(model)
    for module in model.modules():
        if "_gradient_checkpointing_func" in vars(module):
            module._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
                function, *args, use_reentrant=True
            )
    with pytest.raises(ValueError, match=rf"Term '{name}' would train nothing.*no gradient.*use_reentrant=False"):
        model(**moe.batch([0]))
    with torch.no_grad():
        assert float(model(**moe.batch([0])).loss) > 0


@pytest.mark.parametrize("name", TERMS)
def test_a_dense_model_is_told(internvl: Family, name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' needs router logits, but InternVL.* it is no mixture of experts"):
        internvl.model(loss=name).train()(**internvl.batch([1]))


def context_of(config: dict[str, Any], **fields: Any) -> Any:
    text = SimpleNamespace(**config)
    model = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: text), stock_class=lambda: SimpleNamespace(__name__="MyMoe")
    )
    batch = {"labels": torch.zeros(1, 4, dtype=torch.long)}
    return SimpleNamespace(model=model, batch=batch, router_logits=(torch.randn(4, 8),), **fields)


@pytest.mark.parametrize(
    "name", ["moe_k", "moe_topk", "num_experts_per_tok", "num_experts_per_token", "top_k_experts"]
)
def test_the_config_says_how_many_experts_a_token_chooses(name: str) -> None:
    function, context = find_loss("moe_balance").function, context_of({name: 3, "hidden_size": 4})
    assert float(function(context)[0]) == float(function(context, top_k=3)[0]) != float(function(context, top_k=2)[0])


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nothing in the config": ({}, {}, r"config of MyMoe gives 0 of moe_k, .*'moe_balance': {'top_k': 2}"),
    "two in the config": ({"moe_k": 1, "moe_topk": 2}, {}, "config of MyMoe gives 2 of"),
    "none": ({"moe_k": 0}, {}, "top_k=0; the router chooses among 8 experts: 1 to 8"),
    "too many": ({}, {"top_k": 9}, "top_k=9; the router chooses among 8"),
    "scores": ({}, {"top_k": 1, "scores": "softmin"}, "scores of moe_balance: 'softmin'. Did you mean 'softmax'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_options_are_told(wrong: str) -> None:
    config, options, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        find_loss("moe_balance").function(context_of(config), **options)


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        (torch.full((4, 8), 1 / 8), " records probabilities, which sum to 1"),
        (torch.randn(3, 8), r"\(B \* T = 4, experts\) of every layer, but transformers recorded \(3, 8\)"),
    ],
    ids=["probabilities", "other rows"],
)
def test_what_is_no_router_logits_is_refused(moe: Family, recorded: torch.Tensor, message: str) -> None:
    labels, hidden = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, 2)
    outputs = {"router_logits": (recorded,)}
    context = hfcustom.LossContext(moe.model(), {"labels": labels}, labels, hidden, outputs, running="moe_balance")
    with pytest.raises(ValueError, match=message):
        context.router_logits  # noqa: B018
