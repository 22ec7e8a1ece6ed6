"""Tests of hfcustom/cache: features and processed images read back are those computed, and nothing stale is ever read."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import KINDS, Family, chat_row, picture
from PIL import Image
from torch import nn
from training import curve, short_config

import hfcustom
from hfcustom.cache.features import FeatureCache, TowerCache, fingerprint
from hfcustom.cache.fingerprint import image_digest
from hfcustom.cache.lazy import LazyRows
from hfcustom.cache.levels import look_up_by_index, on_device
from hfcustom.cache.pictures import ImageCache
from hfcustom.cache.refusals import why_not_cached, why_tower_only
from hfcustom.cache.run import Caches, serving
from hfcustom.cache.store import ShardStore, size_of
from hfcustom.data import images
from hfcustom.data.collate import Batch, Collator
from hfcustom.data.messages import RowError
from hfcustom.data.packing import pack_rows
from hfcustom.data.sources import Examples
from hfcustom.parts import unwrap
from hfcustom.train import fit


def frozen(family: Family, model_class: Any = None, **config: Any) -> Any:
    """Return a tiny model in train mode whose language model alone is trained."""
    model = family.model(model_class, **config).train()
    hfcustom.freeze(model, [part for part in ("vision", "connector") if part in family.parts])
    return model


def caches_for(model: Any, folder: Path, **options: Any) -> Caches:
    """Return caches of features and layouts in a folder, newly opened."""
    layouts = ImageCache(ShardStore(folder, "layouts", 1e12), keeps_pixels=False)
    features = ShardStore(folder, "features", 1e12)
    return Caches(layouts, features, model.placeholder_token_id, **{"pixels_wanted": False, **options})


def step(model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and every gradient of one forward and backward."""
    model.zero_grad()
    with serving(model, batch):
        loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first: Any, second: Any) -> None:
    assert torch.equal(first[0], second[0])
    assert first[1].keys() == second[1].keys()
    assert not [name for name in first[1] if not torch.equal(first[1][name], second[1][name])]


def count_runs(model: Any) -> list[int]:
    """Return a list that grows with each run of the vision tower."""
    runs: list[int] = []
    for path in model.stock_parts().paths["vision"]:
        model.get_submodule(path).register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


def count_layers(model: Any) -> list[int]:
    """Return a list that grows with each run of the first Linear or convolution of the vision tower."""
    runs: list[int] = []
    tower = model.get_submodule(model.stock_parts().paths["vision"][0])
    first = next(module for module in tower.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    first.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


# ---- every family ---------------------------------------------------------------------------------------------------


def test_cached_features_change_no_bit(family: Family, tmp_path: Path) -> None:
    model, rows = frozen(family), [chat_row(2, 0), chat_row(0, 1), chat_row(1, 2)]
    if model.no_feature_cache:
        assert model.no_feature_cache in why_not_cached(model)
        return
    assert not why_not_cached(model)
    if why_tower_only(model):
        assert model.no_connector_cache == why_tower_only(model)
        return
    runs = count_runs(model)
    plain = step(model, Collator(family.processor)(rows))
    ran = len(runs)
    caches = caches_for(model, tmp_path)
    assert ran and caches.features is not None
    with FeatureCache(model, caches.features).installed():
        collate = Collator(family.processor, caches=caches)
        assert_same(step(model, collate(rows)), plain)
        assert len(runs) == 2 * ran
        known = collate(rows)
        assert_same(step(model, known), plain)
        some = collate([chat_row(1, 3), *rows])  # one image is new, pixels of the others are blank
    cached = Collator(family.processor, caches=caches_for(model, tmp_path))  # as another process reads it
    with FeatureCache(model, caches.features).installed():
        assert_same(step(model, cached(rows)), plain)
        assert len(runs) == 2 * ran
        mixed = step(model, some)
    assert len(runs) == 3 * ran
    torch.testing.assert_close(mixed[0], step(model, Collator(family.processor)([chat_row(1, 3), *rows]))[0])


def test_cached_towers_train_the_connector_as_ever(family: Family, tmp_path: Path) -> None:
    model, rows = family.model().train(), [chat_row(1, 0), chat_row(0, 1), chat_row(1, 2)]
    hfcustom.freeze(model, ["vision"])
    if why := why_not_cached(model):
        assert model.no_feature_cache in why or model.no_tower_cache in why
        return
    assert why_tower_only(model)
    runs = count_layers(model)
    plain = step(model, Collator(family.processor)(rows))
    ran = len(runs)
    caches = caches_for(model, tmp_path)
    assert ran and caches.features is not None
    with TowerCache(model, caches.features).installed():
        collate = Collator(family.processor, caches=caches)
        for times in (2, 2):
            assert_same(step(model, collate(rows)), plain)
            assert len(runs) == times * ran
        mixed = step(model, collate([chat_row(1, 3), *rows]))
    torch.testing.assert_close(mixed[0], step(model, Collator(family.processor)([chat_row(1, 3), *rows]))[0])


def test_processed_images_change_no_bit(family: Family, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    rows = [chat_row(2, 0), chat_row(0, 1), chat_row(1, 2)]
    plain = Collator(family.processor)(rows)
    for time in range(2):
        cache = ImageCache(ShardStore(tmp_path, "images", 1e12))
        cached = Collator(family.processor, caches=Caches(cache))(rows)
        cache.store.flush()
        assert cached.keys() == plain.keys()
        assert (cached.levels is not None) == (cached.get("pixel_values", torch.zeros(0)).dtype == torch.uint8)
        found = on_device(cached, torch.device("cpu"))
        assert not [name for name in plain if not torch.equal(found[name], plain[name])]
        if cached.levels is not None:  # as a device other than a CPU reads them
            values = look_up_by_index(cached["pixel_values"], cached.levels)
            assert torch.equal(values, plain["pixel_values"])
        if cache.hits + cache.misses:
            assert (cache.hits, cache.misses) == ((0, 3), (3, 0))[time]
        else:  # as LLaVA-OneVision's, which tiles a row's only image
            assert "depends on those beside it" in said.text
            return


@pytest.mark.parametrize("images", [[2, 0, 1], [3, 2, 1], [2, 0, 1, 3]], ids=str)
def test_rows_of_many_images_are_put_together_from_each(family: Family, images: list[int], tmp_path: Path) -> None:
    rows = [chat_row(count, seed) for seed, count in enumerate(images)]
    plain = Collator(family.processor)(rows)
    caches = Caches(ImageCache(ShardStore(tmp_path, "images", 1e12)))
    found = on_device(Collator(family.processor, caches=caches)(rows), torch.device("cpu"))
    assert found.keys() == plain.keys() and not [name for name in plain if not torch.equal(found[name], plain[name])]


def test_pixels_of_crops_are_bytes_until_they_are_used(internvl: Family, tmp_path: Path) -> None:
    caches = Caches(ImageCache(ShardStore(tmp_path, "images", 1e12)))
    collate, plain = Collator(internvl.processor, caches=caches), Collator(internvl.processor)
    rows = [chat_row(1, 0), chat_row(1, 1)]
    singles = [collate([row]) for row in rows]
    assert all(single["pixel_values"].dtype == torch.uint8 for single in singles)
    packer = type(internvl.model()).merge_images
    expected = pack_rows([plain([row]) for row in rows], packer)["pixel_values"]
    packed = pack_rows(singles, packer)
    assert packed["pixel_values"].dtype == torch.uint8
    assert torch.equal(on_device(packed, torch.device("cpu"))["pixel_values"], expected)
    assert torch.equal(on_device(packed.blank_copy(), torch.device("cpu"))["pixel_values"], expected)
    mixed = pack_rows([singles[0], plain([rows[1]])], packer)  # one of them as floats
    assert mixed.levels is None and torch.equal(mixed["pixel_values"], expected)


def test_a_processor_that_makes_numbers_of_bytes_gets_floats(internvl: Family, tmp_path: Path) -> None:
    class Scales(internvl.module.CustomInternVLProcessor):  # type: ignore[misc, name-defined]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            features = super().__call__(*args, **kwargs)
            features["pixel_values"] = [torch.as_tensor(crop).float() * 2 for crop in features["pixel_values"]]
            return features

    processor = copy.copy(internvl.processor)
    processor.__class__ = Scales
    caches = Caches(ImageCache(ShardStore(tmp_path, "images", 1e12)))
    found = Collator(processor, caches=caches)([chat_row(1)])
    assert found.levels is None and caches.images is not None and not caches.images.gives_levels
    assert torch.equal(found["pixel_values"], Collator(processor)([chat_row(1)])["pixel_values"])


# ---- runs of fit() --------------------------------------------------------------------------------------------------

ROWS = [chat_row(count, seed) for seed, count in enumerate((1, 2, 0, 1))]


def run(model: Any, processor: Any, folder: Path, **options: Any) -> list[float]:
    """Train for two epochs of two steps and return each step's loss."""
    config = short_config(folder / "run", max_steps=4, batch_size=2, micro_batch_size=1, overwrite=True, **options)
    return curve(fit(model, processor, ROWS, config))


def test_packed_rows_are_served(internvl: Family, tmp_path: Path) -> None:
    def packed(model: Any, **options: Any) -> list[float]:
        config = short_config(tmp_path / "run", max_steps=2, batch_size=4, packing=True, overwrite=True, **options)
        return curve(fit(model, internvl.processor, ROWS, config))

    plain, model = packed(frozen(internvl)), frozen(internvl)
    assert packed(frozen(internvl), cache_images=str(tmp_path / "images")) == plain
    runs = count_runs(model)
    assert packed(model, cache_features=str(tmp_path / "features")) == plain
    assert len(runs) == 1, "the second step reads what the first has made"


@pytest.mark.parametrize("name", KINDS)
def test_runs_with_caches_are_those_without(
    name: str, families: dict[str, Family], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, folders = families[name], {"cache_images": str(tmp_path / "images")}
    if not family.model_class.no_feature_cache:
        folders["cache_features"] = str(tmp_path / "features")
    plain = run(frozen(family), family.processor, tmp_path)
    model = frozen(family)
    runs = count_runs(model)
    assert run(model, family.processor, tmp_path, **folders) == plain
    if "cache_features" in folders:
        images = sum(len(row["images"]) for row in ROWS)
        assert f"image features: {images} images" in capsys.readouterr().out
        first = len(runs)
        model = frozen(family)
        runs = count_runs(model)
        assert run(model, family.processor, tmp_path, num_workers=1, **folders) == plain
        assert first and not runs, "another run, with a process that loads"
        assert "100% hits" in capsys.readouterr().out


def test_lora_on_the_language_model_trains_on_cached_features(internvl: Family, tmp_path: Path) -> None:
    plain, cached = (hfcustom.lora(internvl.model(), ["language"], rank=2) for _ in range(2))
    folder = str(tmp_path / "features")
    losses = run(plain, internvl.processor, tmp_path)
    assert run(cached, internvl.processor, tmp_path, cache_features=folder, precision="bf16") != losses
    cached = hfcustom.lora(internvl.model(), ["language"], rank=2)
    runs = count_runs(unwrap(cached))
    assert run(cached, internvl.processor, tmp_path, cache_features=folder) == losses
    assert len(runs) == 3, "each batch with images once: what another precision made is not read"


def test_features_that_would_be_wrong_are_refused_by_reason(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    hfcustom.freeze(model, ["connector"])
    with pytest.raises(ValueError, match="vision_tower.* is trained.*--freeze vision"):
        run(model, internvl.processor, tmp_path, cache_features=str(tmp_path / "features"))
    assert not list(tmp_path.iterdir()), "said before anything is deleted or made"
    assert "lora_A" in why_not_cached(hfcustom.lora(internvl.model(), ["vision", "language"], rank=2))
    model = frozen(internvl)
    model.model.vision_tower.encoder.layer[0].attention.attention_dropout = 0.1
    assert "drops values" in why_not_cached(model)
    assert "compiled" in why_not_cached(torch.compile(frozen(internvl)))

    @hfcustom.register
    class Changed(internvl.model_class):  # type: ignore[misc, name-defined]
        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            return features * 2

    changed = frozen(internvl, Changed)
    assert not why_not_cached(changed) and "transform_vision_features" in why_tower_only(changed)
    plain = run(frozen(internvl, Changed), internvl.processor, tmp_path)
    folder = str(tmp_path / "features")
    assert run(changed, internvl.processor, tmp_path, cache_features=folder) == plain
    assert run(frozen(internvl), internvl.processor, tmp_path, cache_features=folder) != plain

    @hfcustom.term(count="image_tokens")
    def seen(context: hfcustom.LossContext) -> tuple[torch.Tensor, int]:
        assert context.vision_features is not None
        return context.vision_features.sum(), 1

    assert "loss seen looks" in why_tower_only(frozen(internvl, loss={"cross_entropy": 1.0, "seen": 0.1}))
    assert "neighbouring" in why_tower_only(frozen(internvl, connector={"name": "frame_average"}))
    asking = frozen(internvl, connector={"name": "token_pruning", "num_kept": 2, "by": "question"})
    hfcustom.freeze(asking, "new")
    assert "looks at what a row asks" in why_tower_only(asking)
    assert "custom_connector" in why_tower_only(frozen(internvl, connector={"name": "perceiver_resampler"}))


# ---- what makes a feature another one -------------------------------------------------------------------------------


def test_weights_settings_and_code_are_in_the_fingerprint(internvl: Family) -> None:
    model, processor = frozen(internvl), internvl.module.tiny_processor()
    found = [fingerprint(model, processor, "fp32"), fingerprint(model, processor, "bf16")]
    nn.init.zeros_(model.lm_head.weight)
    assert fingerprint(model, processor, "fp32") == found[0], "the language model is another part"
    for path in ("model.vision_tower.encoder.layer.1.mlp.fc2.bias", "model.multi_modal_projector.linear_1.weight"):
        with torch.no_grad():
            model.get_parameter(path).flatten()[0] += 1e-3
        found.append(fingerprint(model, processor, "fp32"))
    model.set_attn_implementation("eager")
    found.append(fingerprint(model, processor, "fp32"))
    processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    found.append(fingerprint(model, processor, "fp32"))

    @hfcustom.register
    class Mine(internvl.model_class):  # type: ignore[misc, name-defined]
        pass

    found.append(fingerprint(frozen(internvl, Mine), processor, "fp32"))
    assert len(set(found)) == len(found)


def test_any_pixel_makes_another_image() -> None:
    image = picture()
    changed = image.copy()
    changed.putpixel((49, 29), tuple(255 - value for value in image.getpixel((49, 29))))
    turned = Image.frombytes("RGB", (30, 50), image.tobytes())
    assert len({image_digest(found) for found in (image, changed, turned)}) == 3
    assert image_digest(image) == image_digest(image.copy())


def test_known_files_are_not_decoded_again(internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {**row, "images": [f"{row_at}-{at}.png" for at in range(len(row["images"]))]}
        for row_at, row in enumerate(ROWS)
    ]
    for row, plain in zip(rows, ROWS, strict=True):
        for name, image in zip(row["images"], plain["images"], strict=True):
            image.save(tmp_path / name)
    decoded: list[Any] = []
    decode = images.decode_image
    monkeypatch.setattr(images, "decode_image", lambda *args: decoded.append(args) or decode(*args))
    cache = ImageCache(ShardStore(tmp_path / "cache", "images", 1e12))
    caches = Caches(cache)
    collate, lazy = Collator(internvl.processor, caches=caches), caches.lazy_rows(Examples(rows, root=tmp_path))
    plain = Collator(internvl.processor)(ROWS)
    for _ in range(2):
        batch = collate([lazy[at] for at in range(len(rows))]).as_floats()
        assert not [name for name in plain if not torch.equal(batch[name], plain[name])]
        assert len(decoded) == 4
    cache.store.flush()
    assert size_of(tmp_path) < plain["pixel_values"].nbytes / 2, "a byte a value"
    image = lazy[0].images[0]
    assert image.size == ROWS[0]["images"][0].size and len(decoded) == 4
    assert np.array_equal(np.asarray(image.resize((20, 20))), np.asarray(ROWS[0]["images"][0].resize((20, 20))))
    assert len(decoded) == 5
    assert image_digest(image.resize(image.size)) != image_digest(image), "a copy may be changed"

    class Changing(Examples):
        pass

    assert not isinstance(caches.lazy_rows(Changing(rows, root=tmp_path)), LazyRows)
    picture(9).save(tmp_path / "0-0.png")  # other content under the same name
    assert not torch.equal(
        collate([lazy[0]]).as_floats()["pixel_values"], Collator(internvl.processor)(ROWS[:1])["pixel_values"]
    )
    (tmp_path / "0-0.png").write_bytes(b"no image")
    with pytest.raises(RowError, match=r"0-0.png"):
        lazy[0]


# ---- the files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What was logged."""
    monkeypatch.setattr(logging.getLogger("hfcustom"), "propagate", True)
    return caplog


def test_damaged_files_are_said_and_read_as_missing(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    store = ShardStore(tmp_path, "features", 1e12)
    store.put("one", {"x": torch.arange(100.0)}, {"n": 1})
    store.flush()
    (path,) = store.folder.glob("*.safetensors")
    whole = path.read_bytes()
    entry = ShardStore(tmp_path, "features", 1e12).get("one")
    assert entry is not None and entry[1] == {"n": 1} and torch.equal(entry[0]["x"], torch.arange(100.0))
    for damaged in (whole[:-40], whole[:20], b"", whole[:-1] + b"\1"):
        path.unlink()
        path.write_bytes(damaged)
        said.clear()
        store = ShardStore(tmp_path, "features", 1e12)
        assert store.get("one") is None and store.get("two") is None
        assert path.name in said.text and "computed anew" in said.text
        store.put("one", {"x": torch.zeros(2)})
        store.flush()
        (new,) = set(store.folder.glob("*.safetensors")) - {path}
        assert ShardStore(tmp_path, "features", 1e12).get("one") is not None
        new.unlink()


def test_stores_share_a_folder_and_stop_at_their_size(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    first, second = (ShardStore(tmp_path, "features", 3000) for _ in range(2))
    for store, key in ((first, "a"), (second, "b")):
        store.put(key, {"x": torch.full((100,), 7.0)})
    assert second.get("a") is None and first.get("a") is not None
    copied = pickle.loads(pickle.dumps(first))
    assert copied.get("a") is None and copied.count() == 0, "what waits is written by the process that made it"
    first.flush()
    second.flush()
    assert first.get("b") is not None and second.get("a") is not None and copied.count() == 2
    first.put("c", {"x": torch.zeros(1000)})
    first.flush()
    assert first.full and "max_cache_gb" in said.text and second.get("c") is None
    assert not list(first.folder.glob(".*"))
