"""What each connector computes, on values small enough to work out by hand; and how frames reach one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Family, chat_row, picture
from torch import nn

from hfcustom.connectors import build_connector, grid_out
from hfcustom.data.collate import Collator


def grid_of_numbers(rows: int, columns: int) -> torch.Tensor:
    """Return (1, rows*columns, 2): the token's number, and minus it."""
    numbers = torch.arange(1.0, rows * columns + 1)
    return torch.stack([numbers, -numbers], -1)[None]


def first_channel(features: torch.Tensor) -> list[float]:
    return features[0, :, 0].tolist()


WINDOWS = ["attention_pooling", "average_pool", "patch_merger", "pixel_shuffle"]


def window(name: str, size: int = 2) -> nn.Module:
    heads = {"num_heads": 1} if name == "attention_pooling" else {}
    return build_connector({"name": name, "size": size, **heads}, 2)


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_start_as_the_mean_of_their_neighbours(name: str) -> None:
    # 1  2 | 3  4      (1+2+5+6)/4   (3+4+7+8)/4
    # 5  6 | 7  8      ...
    out = window(name)(grid_of_numbers(4, 4))
    torch.testing.assert_close(torch.tensor(first_channel(out)), torch.tensor([3.5, 5.5, 11.5, 13.5]))
    torch.testing.assert_close(out[..., 1], -out[..., 0])


@pytest.mark.parametrize("name", WINDOWS)
def test_borders_of_a_grid_that_the_window_does_not_divide(name: str) -> None:
    # 1 2 | 3      means 3 (1,2,4,5), 4.5 (3,6), and in the last row 7.5 (7,8), 9
    # 4 5 | 6
    # 7 8 | 9
    out = first_channel(window(name)(grid_of_numbers(3, 3), (3, 3)))
    if name == "pixel_shuffle":  # its matrix divides by four, and adds zeros for what lies outside
        expected = [3.0, 2.25, 3.75, 2.25]
    else:
        expected = [3.0, 4.5, 7.5, 9.0]
    torch.testing.assert_close(torch.tensor(out), torch.tensor(expected))
    assert grid_out(window(name), 9, (3, 3)) == (2, 2)


def test_pixel_shuffle_lays_neighbours_side_by_side() -> None:
    module: Any = window("pixel_shuffle")
    with torch.no_grad():
        weight = torch.zeros(2, 4, 2)  # (out, neighbour, channel)
        weight[0, 3, 0] = 1.0  # the first channel takes the neighbour below on the right,
        weight[1, 2, 1] = 10.0  # the second ten times the one below on the left
        module.proj.weight.copy_(weight.flatten(1))
    out = module(grid_of_numbers(4, 4))
    assert first_channel(out) == [6.0, 8.0, 14.0, 16.0]
    assert out[0, :, 1].tolist() == [-50.0, -70.0, -130.0, -150.0]


def test_attention_pooling_goes_where_its_query_points() -> None:
    module: Any = window("attention_pooling")
    with torch.no_grad():
        module.attention.q_proj.bias.copy_(torch.tensor([1000.0, 0.0]))
        module.attention.k_proj.weight.copy_(torch.eye(2))
        module.attention.k_proj.bias.zero_()
    assert first_channel(module(grid_of_numbers(4, 4))) == [6.0, 8.0, 14.0, 16.0]  # the largest of each window
    assert first_channel(module(grid_of_numbers(3, 3), (3, 3))) == [5.0, 6.0, 8.0, 9.0]
    with torch.no_grad():
        module.attention.q_proj.bias.neg_()
    assert first_channel(module(grid_of_numbers(3, 3), (3, 3))) == [1.0, 3.0, 7.0, 9.0]  # never the zeros outside


def test_patch_merger_is_qwens_merge_beside_the_mean() -> None:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

    module: Any = build_connector("patch_merger", 8)
    stock = PatchMerger(dim=8, context_dim=8)
    with torch.no_grad():
        for mine, theirs in ((module.norm, stock.ln_q), (module.up, stock.mlp[0]), (module.down, stock.mlp[2])):
            nn.init.normal_(theirs.weight)
            mine.load_state_dict(theirs.state_dict())
        module.norm.eps = stock.ln_q.eps
        features = torch.randn(1, 16, 8)
        windows, _ = module.windows(features, None)  # (1, 4, 4, 8)
        expected = stock(windows.flatten(0, 2)) + windows.mean(2)[0]
        torch.testing.assert_close(module(features)[0], expected)


def test_linear_and_mlp_are_what_they_say() -> None:
    features = torch.tensor([[[1.0, 2.0]]])
    linear: Any = build_connector("linear", 2)
    with torch.no_grad():
        linear.proj.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
        linear.proj.bias.copy_(torch.tensor([0.5, 0.0]))
        assert linear(features).tolist() == [[[3.5, 6.0]]]
    for residual in (True, False):
        mlp: Any = build_connector({"name": "mlp", "residual": residual}, 2)
        assert (mlp.down.weight == 0).all() == residual
        with torch.no_grad():
            for layer, scale in ((mlp.up, 1.0), (mlp.down, 2.0)):
                layer.weight.copy_(scale * torch.eye(2))
                layer.bias.zero_()
            expected = 2 * nn.functional.gelu(features) + (features if residual else 0)
            torch.testing.assert_close(mlp(features), expected)


def test_query_cross_attention_averages_what_its_queries_see_alike() -> None:
    spec = {"name": "query_cross_attention", "num_queries": 2, "num_heads": 1, "start": "random"}
    module: Any = build_connector(spec, 4)
    with torch.no_grad():
        attention = module.attention
        nn.init.zeros_(attention.q_proj.weight)
        nn.init.zeros_(attention.q_proj.bias)
        for layer in (attention.v_proj, attention.o_proj):
            layer.weight.copy_(torch.eye(4))
            layer.bias.zero_()
        features = torch.randn(3, 5, 4)
        seen = nn.functional.layer_norm(features, (4,)).mean(1, keepdim=True)
        torch.testing.assert_close(module(features), module.mlp(seen).expand(3, 2, 4))


@pytest.mark.parametrize("name", ["perceiver_resampler", "query_cross_attention"])
def test_queries_start_as_averages_of_regions(name: str) -> None:
    # 1  2 | 3  4      (1+2+5+6)/4   (3+4+7+8)/4
    # 5  6 | 7  8      ...
    module: Any = build_connector({"name": name, "num_queries": 4, "num_heads": 1}, 2)
    torch.testing.assert_close(module(grid_of_numbers(4, 4)), window("average_pool")(grid_of_numbers(4, 4)))
    tall, long = module(grid_of_numbers(4, 1), (4, 1)), module(grid_of_numbers(1, 8), (1, 8))
    assert first_channel(tall) == [1.0, 2.0, 3.0, 4.0] and first_channel(long) == [1.5, 3.5, 5.5, 7.5]
    assert [grid_out(module, 16, grid) for grid in ((4, 4), (8, 2), (2, 8))] == [(2, 2), (4, 1), (1, 4)]
    assert first_channel(module(grid_of_numbers(1, 8))) == [1.5, 3.5, 5.5, 7.5]  # no square: a row
    random: Any = build_connector({"name": name, "num_queries": 4, "num_heads": 1, "start": "random"}, 2)
    assert not torch.equal(random.queries.weight[0], random.queries.weight[1])
    assert grid_out(random, 16, (4, 4)) == (1, 4) and random(grid_of_numbers(4, 4)).shape == (1, 4, 2)


def test_token_pruning_keeps_what_differs_and_the_order() -> None:
    background, thing = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    other = torch.tensor([0.0, 0.0, 2.0])
    crop = torch.stack([background, other, background, background, thing, background])[None]  # (1, 6, 3)
    assert torch.equal(build_connector({"name": "token_pruning", "num_kept": 2}, 3)(crop), crop[:, [1, 4]])
    assert torch.equal(build_connector({"name": "token_pruning", "num_kept": 3}, 3)(crop), crop[:, [0, 1, 4]])  # a tie
    assert torch.equal(build_connector({"name": "token_pruning", "num_kept": 9}, 3)(crop), crop)
    assert [
        build_connector({"name": "token_pruning", "keep_ratio": share}, 3).num_tokens_out(6)
        for share in (0.1, 0.5, 0.51, 1.0)
    ] == [1, 3, 4, 6]


def test_token_pruning_learns_what_to_keep() -> None:
    """The learned part outweighs the distance, scales what it keeps, and gets a gradient from the kept tokens alone."""
    module: Any = build_connector({"name": "token_pruning", "num_kept": 1}, 3)
    crop = torch.eye(3)[None].requires_grad_()  # three tokens, each as far from the mean
    with torch.no_grad():
        module.score.weight.copy_(torch.tensor([[-1.0, -1.0, 2.0]]))
    out = module(crop)
    learned = float(module.score(nn.functional.layer_norm(crop[0, 2], (3,))).detach())
    torch.testing.assert_close(out, 2 * torch.sigmoid(torch.tensor(learned)) * crop[:, 2:])
    out.sum().backward()
    assert crop.grad is not None and (crop.grad[0, :2] == 0).all() and (crop.grad[0, 2] != 0).any()
    assert module.score.weight.grad.abs().sum() > 0


# ---- frames ---------------------------------------------------------------------------------------------------------


def test_frame_average_deals_a_clips_tokens_to_its_frames() -> None:
    frames = torch.tensor([[1.0, 2, 3], [5, 6, 7], [0, 0, 0], [2, 2, 4]])[..., None]  # (4 crops, 3 tokens, 1)
    out = build_connector({"name": "frame_average", "frames": 2}, 1)(frames)
    assert out[..., 0].tolist() == [[3.0, 4.0], [5.0, 5.0], [1.0, 1.0], [2.0, 2.0]]  # the last token fills the rest
    whole = build_connector({"name": "frame_average", "frames": 4}, 1)(frames)
    assert whole[..., 0].tolist() == [[2.0], [2.5], [3.5], [3.5]]
    with pytest.raises(ValueError, match="frames=3 takes 3 neighbouring crops together, but 4 came. Give each row"):
        build_connector({"name": "frame_average", "frames": 3}, 1)(frames)


def test_temporal_dedup_keeps_the_first_frame_and_what_changes() -> None:
    right, up, left = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    first = torch.stack([right, up, right, up])
    second = torch.stack([right, right, right, left])  # tokens 1 and 3 turned by 90 degrees
    third = torch.stack([left, right, 5 * right, left])  # token 0 turned back, token 2 only grew
    clip = torch.stack([first, second, third])  # (3 crops, 4 tokens, 2)
    module = build_connector({"name": "temporal_dedup", "frames": 3, "keep_ratio": 0.5}, 2)
    kept = torch.cat([first, second[1:2], third[0:1]])  # 6 of 12: the largest change, then the earliest of the equal
    assert torch.equal(module(clip), kept.view(3, 2, 2))
    module = build_connector({"name": "temporal_dedup", "frames": 3, "keep_ratio": 0.6}, 2)
    kept = torch.cat([first, second, third[0:1]])  # 9 of 12: all three that changed, then the earliest that did not
    assert torch.equal(module(clip), kept.view(3, 3, 2))


FRAMES = [{"name": "frame_average", "frames": 2}, {"name": "temporal_dedup", "frames": 2, "keep_ratio": 0.75}]


@pytest.mark.parametrize("spec", FRAMES, ids=lambda spec: spec["name"])
def test_clips_of_a_batch_are_those_of_its_rows(family: Family, spec: dict[str, Any]) -> None:
    if "connector" in family.model_class.lacks:
        return  # tests/test_connectors.py shows that it says so
    model = family.corrected(connector=spec)
    collate = Collator(model.match_processor(copy.deepcopy(family.processor)))
    rows = [chat_row(count, seed) for seed, count in enumerate([4, 0, 2])]
    together = dict(collate(rows))
    with torch.no_grad():
        logits = model(**together).logits
        for at, row in enumerate(rows):
            alone = dict(collate([row]))
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(logits[at, :length], model(**alone).logits[0], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("spec", FRAMES, ids=lambda spec: spec["name"])
def test_a_clip_of_two_rows_is_an_error(family: Family, spec: dict[str, Any]) -> None:
    if {"connector", "placeholders"} & family.model_class.lacks.keys():
        return  # as tests/test_connectors.py shows, and tests/test_mllama.py
    model = family.model(connector=spec)
    processor = model.match_processor(copy.deepcopy(family.processor))
    alone = family.batch([1], processor)
    odd = int((alone["input_ids"] == model.placeholder_token_id).sum()) // model_tokens(model, alone) % 2
    if odd:  # as many crops as could be paired, were it not for the row's end
        with pytest.raises(ValueError, match="row 0 of the batch ends amid such 2. Give each row a multiple of 2"):
            model(**family.batch([1, 1], processor))
        with pytest.raises(ValueError, match="takes 2 neighbouring crops together, but"):
            model(**alone)


def model_tokens(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Return how many tokens the connector made of the first crop of a batch that it refuses as a whole."""
    seen: list[int] = []

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(module.num_tokens_out(args[0].shape[1]))

    handle = model.custom_connector.register_forward_pre_hook(note)
    try:
        model(**batch)
    except ValueError:
        pass
    handle.remove()
    return seen[0]


def test_images_of_different_sizes_make_no_clip(families: dict[str, Family]) -> None:
    family = families["qwen2_vl"]
    model = family.model(connector=FRAMES[0])
    processor = model.match_processor(copy.deepcopy(family.processor))
    row = chat_row(2)
    row["images"][1] = picture(1, (40, 40))
    with pytest.raises(ValueError, match=r"must have one size; the tokens of some lie \(\d, \d\) and \(\d, \d\)"):
        model(**Collator(processor)([row]))
    row["images"][0] = picture(2, (40, 40))
    model(**Collator(processor)([row]))
