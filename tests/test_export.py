"""hfcustom export: the stock class gets the very model, in a process without hfcustom; or it is said why it cannot."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import Family
from encoder_cases import Encoder, encoders
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoModelForZeroShotImageClassification, BitsAndBytesConfig

import hfcustom
from hfcustom import adapt, cli
from hfcustom.export import verify
from hfcustom.export.departures import find_departures
from hfcustom.export.write import NotStock, export_checkpoint
from hfcustom.training.checkpoint import save_model

ENCODERS = encoders()
OTHER_TOKENS = {"chameleon", "paligemma"}  # a separator, a newline: what hfcustom's processors leave to the template


@pytest.fixture(autouse=True)
def quick_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that verify are forked from one without hfcustom; the command's test starts a real one."""
    monkeypatch.setattr(verify, "subprocess", forked)


def saved(family: Family, folder: Path, model: Any = None) -> Path:
    (family.model() if model is None else model).save_pretrained(folder)
    family.processor.save_pretrained(folder)
    return folder


def is_exportable(family: Family) -> bool:
    return bool(family.stock_class.__module__.startswith("transformers."))


def quietly(source: Path, out: Path, **options: Any) -> Any:
    return export_checkpoint(source, out, say=lambda stage: None, **options)


def trained_adapter(family: Family, base: Any, folder: Path, **options: Any) -> Any:
    """Save an adapter whose every tensor was moved."""
    wrapped = adapt.lora(base, rank=2, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    save_model(wrapped, family.processor, folder)
    return wrapped.eval()


def logits(model: Any, family: Family) -> torch.Tensor:
    batch = family.batch([1])
    del batch["labels"]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**batch).logits
    return found


# ---- every family ---------------------------------------------------------------------------------------------------


def test_the_stock_class_loads_it_whole_without_hfcustom(family: Family, tmp_path: Path) -> None:
    source = saved(family, tmp_path / "source")
    if not is_exportable(family):
        with pytest.raises(ValueError, match="no class of transformers.*hfcustom bundle"):
            quietly(source, tmp_path / "out")
        return
    done = quietly(source, tmp_path / "out")
    assert done.stock_class == family.stock_class.__name__
    assert done.verdict.num_tensors == len(family.model().state_dict())
    assert done.verdict.difference == 0.0
    writes = "writes 3" if family.name in OTHER_TOKENS else "writes the same"
    assert writes in done.verdict.processor or "wants torchvision" in done.verdict.processor
    config = json.loads((done.folder / "config.json").read_text())
    stock_type = family.stock_class.config_class.model_type
    assert config["model_type"] == stock_type and "loss" not in config and "connector" not in config
    assert config["architectures"] == [family.stock_class.__name__]
    assert not [path.name for path in done.folder.iterdir() if path.name in verify.LEFTOVERS]
    assert "Custom" not in "".join(path.read_text() for path in done.folder.glob("*.json"))


def test_the_keys_are_those_that_the_stock_class_writes(family: Family, tmp_path: Path) -> None:
    if not is_exportable(family):
        pytest.skip("the parent is no class of transformers")
    quietly(saved(family, tmp_path / "source"), tmp_path / "out", check=False)
    family.model(family.stock_class).save_pretrained(tmp_path / "stock")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "stock"))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}


def test_an_adapter_is_merged_into_its_base(family: Family, tmp_path: Path) -> None:
    if not is_exportable(family):
        pytest.skip("the parent is no class of transformers")
    base = family.model_class.from_pretrained(saved(family, tmp_path / "base"))
    expected = logits(trained_adapter(family, base, tmp_path / "adapter"), family)
    quietly(tmp_path / "adapter", tmp_path / "out", check=False)
    stock, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(stock) is family.stock_class and not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(stock, family), expected, rtol=1e-4, atol=1e-5)
    assert (logits(family.model(), family) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("loss", ["contrastive", "sigmoid"])
def test_encoders_too_and_a_bias_of_the_loss_is_no_part_of_them(name: str, loss: str, tmp_path: Path) -> None:
    encoder: Encoder = ENCODERS[name]
    model = encoder.model(loss=loss)
    model.save_pretrained(tmp_path / "source")
    encoder.processor.save_pretrained(tmp_path / "source")
    done = quietly(tmp_path / "source", tmp_path / "out")
    assert done.verdict.difference == 0.0 and done.stock_class == encoder.stock_class.__name__
    stock = AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / "out")
    batch = encoder.batch()
    with torch.no_grad():
        assert torch.equal(stock(**batch).logits_per_image, model(**batch).logits_per_image)


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(internvl: Family, tmp_path: Path) -> Path:
    return saved(internvl, tmp_path / "base")


def test_an_adapter_on_8_bits_is_merged_into_full_precision(
    internvl: Family, checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    plan: BitsAndBytesConfig = adapt.quantization_config(checkpoint)
    base = internvl.model_class.from_pretrained(checkpoint, quantization_config=plan)
    trained_adapter(internvl, base, tmp_path / "adapter")
    done = quietly(tmp_path / "adapter", tmp_path / "out")
    assert done.verdict.num_tensors == len(internvl.model().state_dict()) and done.verdict.difference < 2e-5
    kinds = {tensor.dtype for tensor in load_file(done.folder / "model.safetensors").values()}
    assert kinds == {torch.float32} and "quantization_config" not in (done.folder / "config.json").read_text()


def test_adapted_experts_are_merged(families: dict[str, Family], tmp_path: Path) -> None:
    aria = families["aria"]
    base = aria.model_class.from_pretrained(saved(aria, tmp_path / "base"))
    trained_adapter(aria, base, tmp_path / "adapter", experts=True)
    assert quietly(tmp_path / "adapter", tmp_path / "out").verdict.difference < 2e-5


def test_parts_trained_in_full_beside_an_adapter_come_along(
    internvl: Family, checkpoint: Path, tmp_path: Path
) -> None:
    base = internvl.model_class.from_pretrained(checkpoint)
    wrapped = trained_adapter(internvl, base, tmp_path / "adapter", train="connector")
    quietly(tmp_path / "adapter", tmp_path / "out", check=False)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(stock, internvl), logits(wrapped, internvl), rtol=1e-4, atol=1e-5)
    before = load_file(checkpoint / "model.safetensors")["model.multi_modal_projector.linear_1.weight"]
    assert not torch.equal(stock.model.multi_modal_projector.linear_1.weight, before)


def test_a_base_that_moved_is_named(internvl: Family, checkpoint: Path, tmp_path: Path) -> None:
    trained_adapter(internvl, internvl.model_class.from_pretrained(checkpoint), tmp_path / "adapter")
    moved = checkpoint.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="is not there; pass its present place: --base"):
        quietly(tmp_path / "adapter", tmp_path / "out")
    assert quietly(tmp_path / "adapter", tmp_path / "out", base=moved, check=False).folder.is_dir()
    with pytest.raises(ValueError, match="no effect"):
        quietly(moved, tmp_path / "second", base=moved)


def test_quantised_weights_are_refused(internvl: Family, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plan = adapt.quantization_config(checkpoint)
    saved(internvl, tmp_path / "small", internvl.model_class.from_pretrained(checkpoint, quantization_config=plan))
    with pytest.raises(ValueError, match="holds quantised weights"):
        quietly(tmp_path / "small", tmp_path / "out")


def test_the_folder_of_a_run_or_a_step_says_where_the_checkpoint_is(internvl: Family, tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step-000100"
    saved(internvl, step / "model")
    with pytest.raises(ValueError, match="the checkpoint in it is .*step-000100/model"):
        quietly(step, tmp_path / "out")
    assert quietly(step / "model", tmp_path / "out", check=False).folder.is_dir()


# ---- how it is written ----------------------------------------------------------------------------------------------


def test_tied_embeddings_are_written_once(internvl: Family, tmp_path: Path) -> None:
    source = saved(internvl, tmp_path / "source", internvl.model(tie_word_embeddings=True))
    done = quietly(source, tmp_path / "out")
    assert done.verdict.difference == 0.0
    assert not [name for name in load_file(done.folder / "model.safetensors") if "lm_head" in name]


def test_dtype_and_shards(internvl: Family, checkpoint: Path, tmp_path: Path) -> None:
    done = quietly(checkpoint, tmp_path / "out", dtype="bfloat16", max_shard_size="100KB")
    files = sorted(done.folder.glob("model-*.safetensors"))
    assert len(files) > 1 and (done.folder / "model.safetensors.index.json").is_file()
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.bfloat16}
    assert 0 < done.verdict.difference < 6e-2
    with pytest.raises(ValueError, match="'int8'; choose float32, bfloat16, float16"):
        quietly(checkpoint, tmp_path / "second", dtype="int8")


def test_a_checkpoint_without_a_processor_says_so(internvl: Family, tmp_path: Path) -> None:
    internvl.model().save_pretrained(tmp_path / "source")
    done = quietly(tmp_path / "source", tmp_path / "out")
    assert "logits not compared; no processor: the checkpoint has none" in str(done.verdict)


def test_generation_settings_and_chat_template_come_along(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    model.generation_config.max_new_tokens = 17
    quietly(saved(internvl, tmp_path / "source", model), tmp_path / "out", check=False)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 17
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == internvl.processor.chat_template


def test_what_is_there_is_not_touched(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        quietly(checkpoint, out)
    assert [path.name for path in out.iterdir()] == ["note.txt"]
    (out / "note.txt").unlink()
    assert quietly(checkpoint, out, check=False).folder == out  # empty is fine


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "out" in path.name)


# ---- what the stock class cannot have -------------------------------------------------------------------------------


def custom(internvl: Family, body: dict[str, Any], **config: Any) -> Any:
    model_class = type("Mine", (internvl.model_class,), {**body, "__module__": __name__})
    return internvl.model(hfcustom.register(model_class), **config)


def _with_gate(self: Any, config: Any) -> None:
    super(type(self), self).__init__(config)
    self.gate = nn.Linear(config.text_config.hidden_size, 1)
    self.post_init()


def _with_other_norm(self: Any, config: Any) -> None:
    super(type(self), self).__init__(config)
    self.model.language_model.norm = nn.LayerNorm(config.text_config.hidden_size)
    self.post_init()


def _with_other_act(self: Any, config: Any) -> None:
    super(type(self), self).__init__(config)
    self.model.multi_modal_projector.act = nn.Tanh()
    self.post_init()


def _with_less(self: Any, config: Any) -> None:
    super(type(self), self).__init__(config)
    self.model.multi_modal_projector.linear_2.bias = None
    self.post_init()


def _louder(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return 1.5 * hidden_states


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "connector": ({"default_connector": "average_pool"}, "connector custom_connector: 'average_pool', a AveragePool"),
    "added module": ({"__init__": _with_gate}, r"added module gate: Linear with weight \(1, 64\), bias \(1,\)"),
    "replaced module": ({"__init__": _with_other_norm}, r"replaced module model.language_model.norm: LayerNorm with"),
    "replaced activation": (
        {"__init__": _with_other_act},
        r"replaced module .*act: Tanh with no tensors in the place",
    ),
    "missing tensor": ({"__init__": _with_less}, r"missing tensor .*linear_2.bias: \(64,\) in the parent, here gone"),
    "method": ({"transform_hidden_states": _louder}, "method transform_hidden_states: overridden in Mine"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_prevents_an_export_is_named(case: str, internvl: Family, tmp_path: Path) -> None:
    body, message = REFUSED[case]
    source = saved(internvl, tmp_path / "source", custom(internvl, body))
    with pytest.raises(NotStock, match=message) as refused:
        quietly(source, tmp_path / "out")
    assert "hfcustom bundle" in str(refused.value) and len(refused.value.departures) == 1
    assert not left(tmp_path)


def test_a_correction_of_stock_is_named(families: dict[str, Family], tmp_path: Path) -> None:
    mllama = families["mllama"]
    saved(mllama, tmp_path / "source", mllama.corrected())
    with pytest.raises(NotStock, match="correction mask_text_rows: Tokens before"):
        quietly(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("case", ["added module", "method", "replaced activation"])
def test_weights_only_leaves_out_what_the_stock_class_has_no_place_for(
    case: str, internvl: Family, tmp_path: Path
) -> None:
    model = custom(internvl, REFUSED[case][0])
    done = quietly(saved(internvl, tmp_path / "source", model), tmp_path / "out", weights_only=True)
    assert len(done.dropped) == 1 and done.verdict.difference is not None
    assert (done.verdict.difference > 1e-3) == (case != "added module")  # which nothing calls


@pytest.mark.parametrize("case", ["connector", "missing tensor", "replaced module"])
def test_weights_only_is_no_help_where_the_stock_class_would_not_be_whole(
    case: str, internvl: Family, tmp_path: Path
) -> None:
    source = saved(internvl, tmp_path / "source", custom(internvl, REFUSED[case][0]))
    with pytest.raises(NotStock, match="--weights-only does not help"):
        quietly(source, tmp_path / "out", weights_only=True)


def test_a_loss_of_ones_own_prevents_nothing(internvl: Family, tmp_path: Path) -> None:
    def compute(self: Any, *args: Any, **kwargs: Any) -> Any:
        return super(type(self), self).loss_counts(*args, **kwargs)

    model = custom(internvl, {"default_loss": {"focal": 1.0, "z_loss": 1e-4}, "loss_counts": compute})
    assert not find_departures(type(model), model.config)
    assert quietly(saved(internvl, tmp_path / "source", model), tmp_path / "out").verdict.difference == 0.0


def test_a_change_that_no_name_shows_is_caught_by_the_logits(internvl: Family, tmp_path: Path) -> None:
    def __init__(self: Any, config: Any) -> None:
        super(type(self), self).__init__(config)
        self.model.language_model.layers[0].self_attn.scaling *= 3
        self.post_init()

    source = saved(internvl, tmp_path / "source", custom(internvl, {"__init__": __init__}))
    with pytest.raises(RuntimeError, match="loads every tensor, yet its logits differ"):
        quietly(source, tmp_path / "out")
    assert not left(tmp_path)


def test_a_tensor_that_came_out_otherwise_is_caught(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hfcustom.export.write as write

    honest = write.fingerprints
    monkeypatch.setattr(write, "fingerprints", lambda model: {**honest(model), "lm_head.weight": 0})
    with pytest.raises(RuntimeError, match="66 of 67 tensors are as exported; not so lm_head.weight"):
        quietly(checkpoint, tmp_path / "out")
    assert not left(tmp_path)


# ---- the command ----------------------------------------------------------------------------------------------------

MY_FILE = """
import hfcustom
from hfcustom.families.internvl import CustomInternVLForConditionalGeneration


@hfcustom.register
class Brighter(CustomInternVLForConditionalGeneration):
    def transform_embeddings(self, embeddings, image_mask):
        return embeddings * 2
"""


def test_the_command_says_what_it_did(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "subprocess", subprocess)
    assert cli.main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert (
        "checked: InternVLForConditionalGeneration: 67 of 67 tensors, bit for bit; logits equal bit for bit" in printed
    )
    assert cli.main(["export", str(checkpoint), str(tmp_path / "out2"), "--no-verify"]) == 0
    assert "not checked: --no-verify" in capsys.readouterr().out
    assert cli.main(["export", str(checkpoint), str(tmp_path / "out3"), "--no-verify", "--weights-only"]) == 0
    assert "--weights-only had nothing to leave out" in capsys.readouterr().out


def test_the_command_names_the_line_and_ends_with_1(
    internvl: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "brighter_file.py"
    file.write_text(MY_FILE)
    from hfcustom.naming import import_file

    source = saved(internvl, tmp_path / "source", internvl.model(import_file(file).Brighter))
    command = ["export", str(source), str(tmp_path / "out"), "--custom", f"{file}:Brighter"]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert f"{file}:8" in said and "method transform_embeddings" in said and "Nothing was written" in said
    assert cli.main([*command, "--weights-only", "--no-verify"]) == 0
    assert "left out, as --weights-only allows: method transform_embeddings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./nowhere", "out"], "There is no folder ./nowhere"),
        (["tests", "out"], "neither config.json nor adapter"),
        (["internvl", "out"], "internvl is the name of a family; name the folder of a checkpoint, or its hub id"),
    ],
)
def test_what_is_no_checkpoint_ends_with_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    assert cli.main(["export", *words]) == 2
    assert message in capsys.readouterr().err and not left(tmp_path)
