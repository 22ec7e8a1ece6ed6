"""Uploading and downloading against a stand-in of the hub: what goes there, what stays, and what comes back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import Family, assert_same_model
from hub_server import OWNER, TOKEN, Hub, serving
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import hub as transformers_hub

import hfcustom
from hfcustom import cli
from hfcustom.card import MARKED, is_edited
from hfcustom.exits import EXIT_UPLOAD, ConfigError, exit_codes
from hfcustom.hub import choose_files, push_folder

NAME = f"{OWNER}/my-vlm"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in that huggingface_hub takes for the hub, with a token and an empty cache."""
    constants = huggingface_hub.constants
    with serving() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        huggingface_hub.close_session()
        yield server
    huggingface_hub.close_session()


def test_a_model_and_its_processor_come_back_as_they_went(internvl: Family, hub: Hub) -> None:
    model = internvl.model(connector="average_pool")
    processor = model.match_processor(internvl.module.tiny_processor())
    model.push_to_hub(NAME, private=True)
    processor.push_to_hub(NAME)
    again = AutoModelForImageTextToText.from_pretrained(NAME)
    reader = AutoProcessor.from_pretrained(NAME)
    assert type(again) is internvl.model_class
    batch = internvl.batch([2, 1], reader)
    assert_same_model(again.eval(), model, batch)
    assert hub.repositories[NAME].private is True
    assert sorted(hub.repositories[NAME].files()) == [
        *(".gitattributes", "README.md", "chat_template.jinja", "config.json", "generation_config.json"),
        *("hfcustom.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert OUTSIDE not in readme(hub)
    assert f'folder = "{NAME}"' in readme(hub)


OUTSIDE = "Written by a person.\n"


def readme(hub: Hub, revision: str = "main") -> str:
    return hub.repositories[NAME].files(revision)["README.md"].decode()


def test_the_card_stands_where_transformers_would_put_an_empty_one(internvl: Family, hub: Hub) -> None:
    internvl.processor.push_to_hub(NAME)
    assert not MARKED.search(readme(hub)), "what transformers writes"
    internvl.model().push_to_hub(NAME)
    assert MARKED.search(readme(hub))
    before = readme(hub)
    internvl.processor.push_to_hub(NAME)
    assert MARKED.search(readme(hub)).group() == MARKED.search(before).group()
    assert not is_edited(readme(hub)), "the processor's upload has touched nothing"


def test_what_a_person_wrote_on_the_hub_stays(internvl: Family, hub: Hub) -> None:
    internvl.model().push_to_hub(NAME)
    repository = hub.repositories[NAME]
    repository.commit(
        "main", {"README.md": readme(hub).replace("tags:", "license: mit\ntags:").encode() + OUTSIDE.encode()}
    )
    internvl.model(loss="focal").push_to_hub(NAME, tags=["mine"])
    assert "| `focal` |" in readme(hub), "between the marks it is new"
    assert readme(hub).endswith(OUTSIDE)
    assert "license: mit" in readme(hub)
    assert "- mine\n" in readme(hub)
    repository.commit("main", {"README.md": OUTSIDE.encode()})
    internvl.model().push_to_hub(NAME)
    assert readme(hub) == OUTSIDE, "without marks it is all theirs"


def test_a_lost_connection_costs_nobody_their_words(
    internvl: Family, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its tries
    internvl.model().push_to_hub(NAME)
    hub.repositories[NAME].commit("main", {"README.md": OUTSIDE.encode()})
    hub.failing = lambda path: path.endswith("/README.md")
    with pytest.raises(LocalEntryNotFoundError, match="check your connection"):
        internvl.model().push_to_hub(NAME)
    assert readme(hub) == OUTSIDE


def test_a_pinned_revision_is_what_it_was(internvl: Family, hub: Hub, tmp_path: Path) -> None:
    first, second = internvl.model(seed=1), internvl.model(seed=2)
    then = first.push_to_hub(NAME).oid
    now = second.push_to_hub(NAME).oid
    assert then != now
    batch = internvl.batch([1])
    pinned = internvl.model_class.from_pretrained(NAME, revision=then)
    assert_same_model(pinned.eval(), first, batch)
    assert_same_model(internvl.model_class.from_pretrained(NAME).eval(), second, batch)
    assert pinned.origin == {"name": NAME, "commit": then, "hub": True}
    pinned.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert f"base_model: {NAME}\n" in text
    assert then in text


def test_a_branch_leaves_main_alone(internvl: Family, hub: Hub, tmp_path: Path) -> None:
    internvl.model(seed=1).push_to_hub(NAME)
    main = hub.repositories[NAME].branches["main"]
    internvl.model(seed=2).save_pretrained(tmp_path / "model", push_to_hub=True, repo_id=NAME, revision="dev")
    assert hub.repositories[NAME].branches["main"] == main
    loaded = internvl.model_class.from_pretrained(NAME, revision="dev").eval()
    assert_same_model(loaded, internvl.model(seed=2), internvl.batch([1]))


def test_a_user_s_own_readme_beside_the_weights_goes_along(internvl: Family, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(OUTSIDE)
    internvl.model().save_pretrained(tmp_path)
    push_folder(tmp_path, NAME)
    assert readme(hub) == OUTSIDE


def train(folder: Path, *arguments: str) -> Path:
    from test_recipes import finetune

    return finetune(folder, *arguments)


@pytest.fixture
def checkpoint(internvl: Family, tmp_path: Path) -> Path:
    from test_recipes import stock_checkpoint

    return stock_checkpoint(internvl, tmp_path)


def test_the_recipe_uploads_what_it_trained_and_nothing_else(
    internvl: Family, hub: Hub, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = ["--eval-data", str(checkpoint / "rows.jsonl"), "--eval-rows", "1", "--max-new-tokens", "2"]
    out = train(checkpoint, "--push-to-hub", NAME, "--freeze", "vision", *scored)
    assert f"The model is uploaded: {hub.url}/{NAME}/commit/" in capsys.readouterr().out
    files = hub.repositories[NAME].files()
    assert hub.repositories[NAME].private is True
    assert not [name for name in files if re.search("optimizer|rng|state|manifest|/|^\\.[^g]", name)]
    assert {"model.safetensors", "README.md", "hfcustom.json", "processor_config.json"} <= files.keys()
    for name, content in files.items():
        if not name.endswith(".safetensors"):
            assert str(checkpoint) not in content.decode(), name
            assert TOKEN not in content.decode(), name
    assert "exact_match" in readme(hub)
    batch = internvl.batch([1])
    there = AutoModelForImageTextToText.from_pretrained(NAME).eval()
    assert_same_model(there, AutoModelForImageTextToText.from_pretrained(out / "model").eval(), batch)


def test_an_adapter_travels_with_its_base(internvl: Family, hub: Hub, checkpoint: Path) -> None:
    base = f"{OWNER}/base"
    internvl.model().push_to_hub(base)
    internvl.processor.push_to_hub(base)
    out = train(checkpoint, "--model", base, "--lora", "--push-to-hub", NAME, "--hub-revision", "v1", "--hub-public")
    assert hub.repositories[NAME].private is False
    text = readme(hub, "v1")
    assert f"base_model: {base}\n" in text
    assert f"base = '{base}'" in text
    assert "library_name: peft" in text
    batch = internvl.batch([1])
    local = hfcustom.load_adapter(out / "model", base)
    snapshot = huggingface_hub.snapshot_download(NAME, revision="v1")
    with torch.no_grad():
        torch.testing.assert_close(hfcustom.load_adapter(snapshot)(**batch).logits, local(**batch).logits)


def test_paths_of_a_local_base_are_not_uploaded(hub: Hub, checkpoint: Path) -> None:
    out = train(checkpoint, "--lora")
    assert str(checkpoint) in (out / "model" / "adapter_config.json").read_text(), (
        "needed here, to find the base again"
    )
    push_folder(out / "model", NAME)
    files = hub.repositories[NAME].files()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "stock"
    assert not [name for name, content in files.items() if str(checkpoint).encode() in content]


def test_a_failed_upload_costs_nothing_and_names_the_command(
    internvl: Family, hub: Hub, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.failing = lambda path: "/commit/" in path
    with pytest.raises(SystemExit) as stopped, exit_codes():
        train(checkpoint, "--push-to-hub", NAME, "--hub-revision", "v1")
    assert stopped.value.code == EXIT_UPLOAD
    said = capsys.readouterr().err
    folder = checkpoint / "out" / "model"
    assert f"The model is safe in {folder}, but was not uploaded: HfHubHTTPError: " in said
    command = re.search(r"Try again: (.*)", said).group(1)
    assert command == f"hfcustom push {folder} {NAME} --revision v1"
    hub.failing = lambda path: False
    assert cli.main(command.split()[1:]) == 0
    assert "files are at" in capsys.readouterr().out
    there = internvl.model_class.from_pretrained(NAME, revision="v1").eval()
    assert_same_model(there, internvl.model_class.from_pretrained(folder).eval(), internvl.batch([1]))


@pytest.mark.parametrize("wrong", ["somebody-else/model", "no-token"])
def test_a_repository_that_cannot_be_written_is_an_error_before_training(
    wrong: str, hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong == "no-token":
        monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ConfigError, match=r"cannot be written to .* Nothing was trained. Log in with `hf auth login`"):
        train(checkpoint, "--push-to-hub", NAME if wrong == "no-token" else wrong)
    assert not (checkpoint / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--push-to-hub", "a/b/c"], "push_to_hub='a/b/c' is no name on the hub: "),
        (["--hub-revision", "v1"], "hub_revision has no effect without --push-to-hub"),
        (["--hub-public"], "hub_public has no effect without --push-to-hub"),
    ],
)
def test_wrong_options_are_said_at_once(given: list[str], said: str) -> None:
    import finetune
    import finetune_encoder

    from hfcustom.options import ConfigError, read

    for config_class in (finetune.FinetuneConfig, finetune_encoder.FinetuneEncoderConfig):
        base = ["--model", "m", "--data", "d"]
        with pytest.raises(ConfigError, match=re.escape(said)):
            read(config_class, None, [*base, *given])


def test_only_what_belongs_to_a_model_is_chosen(
    internvl: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "step-000001" / "model"
    internvl.model().save_pretrained(folder)
    internvl.processor.save_pretrained(folder)
    before = choose_files(folder).files
    strange = [
        "optimizer.safetensors",
        "rng-0.safetensors",
        ".env",
        "token",
        "notes.txt",
        "code.py",
        "checkpoints/model.safetensors",
    ]
    for name in strange:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    chosen = choose_files(folder)
    assert chosen.files == before
    assert sorted(chosen.left) == sorted(strange)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "code.Config"}}))
    (folder / "requirements.txt").write_text("torch>=2.10\n")
    brought = {"code.py", "requirements.txt"} & set(choose_files(folder).files)
    assert len(brought) == 2, "a bundle brings its code, and says what that needs"
    with pytest.raises(ValueError, match=rf"is no saved model: .* Did you mean {re.escape(str(folder))}\?"):
        choose_files(folder.parent)
    assert cli.main(["push", str(folder), NAME, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == choose_files(folder).files
    assert cli.main(["push", str(tmp_path / "nowhere"), NAME]) == 2
    assert "There is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(("url", "name"), [(None, "somebody-else/model"), ("http://127.0.0.1:9", NAME)])
def test_a_push_that_fails_says_so(
    url: str | None,
    name: str,
    internvl: Family,
    hub: Hub,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if url is not None:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    internvl.model().save_pretrained(tmp_path)
    assert cli.main(["push", str(tmp_path), name]) == 1
    assert re.search(r"hfcustom push: nothing was committed \(\w+Error: .*\)\. Try again\.", capsys.readouterr().err)
