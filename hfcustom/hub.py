"""Uploading a saved model to the hub: weights, processor, change card and hfcustom.json, and nothing else that lies beside them.

push_folder(folder, "me/my-vlm", private=True) -> the hub's commit     hfcustom push FOLDER NAME

Never uploaded: optimiser states, random states and manifests of a checkpoint, hidden files, tokens, folders. A README.md that
somebody wrote on the hub stays. What adapter_config.json says of a local base is reduced to its name.
"""

from __future__ import annotations

import fnmatch
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import RemoteEntryNotFoundError

from hfcustom.card import README, is_edited, merge_texts
from hfcustom.card_text import HERE
from hfcustom.exits import ConfigError, UploadError
from hfcustom.naming import printable
from hfcustom.record import FILE, public
from hfcustom.train_config import HubOptions

PUSHED = ("repo_id", "private", "revision", "token", "commit_message", "commit_description", "create_pr", "tags")
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "model*.safetensors.index.json")
BESIDE = (
    *(README, FILE, "LICENSE*", "NOTICE*", "config.json", "generation_config.json", "adapter_config.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.model", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
PLACEHOLDER = (  # what transformers' own push_to_hub of a processor writes where there is no card
    "This is the model card of a \U0001f917 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)


@dataclass(frozen=True)
class Choice:
    """What of a folder is uploaded and what stays, by names below it."""

    files: list[str]
    left: list[str]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    tags: Iterable[str] | None = None,
) -> CommitInfo:
    """Upload a saved model, a merged one, an adapter or a bundle in one commit; the repository is made where there is none.

    `private` counts where the repository is made; None is the account's own default. `revision` is a branch, made where there
    is none. Raises ValueError for a folder that is no saved model, and what huggingface_hub raises.
    """
    folder = Path(folder)
    chosen = choose_files(folder)
    api = HfApi(library_name="hfcustom")
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id=repo_id, branch=revision, token=token, exist_ok=True)
    operations = []
    for name in chosen.files:
        content: str | bytes | None = str(folder / name)
        if name == README:
            there = _text_on_hub(api, repo_id, revision, token)
            content = _card((folder / name).read_text(encoding="utf-8", errors="replace"), there, repo_id, tags)
        elif name == "adapter_config.json":
            content = _without_paths(folder / name)
        if content is not None:
            operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
    return api.create_commit(
        repo_id=repo_id,
        operations=operations,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        token=token,
        create_pr=create_pr,
    )


def choose_files(folder: Path) -> Choice:
    """Return which files of a saved model are uploaded; ValueError for a folder that holds none."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; name one that save_pretrained or fit() wrote.")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    patterns = (*WEIGHTS, *BESIDE, *(["*.py", "requirements.txt"] if _is_bundle(folder) else []))
    top = {name for name in names if "/" not in name or name.startswith("additional_chat_templates/")}
    files = [name for name in names if name in top and any(fnmatch.fnmatchcase(name, each) for each in patterns)]
    if not {"config.json", "adapter_config.json"}.intersection(files) or not any(
        fnmatch.fnmatchcase(name, each) for name in files for each in WEIGHTS[:2]
    ):
        inside = [path.parent for path in sorted(folder.glob("**/config.json"))]
        cure = f" Did you mean {inside[0]}?" if inside else " Name one that save_pretrained or fit() wrote."
        raise ValueError(f"{folder} is no saved model: it lacks config.json or model.safetensors.{cure}")
    return Choice(files, [name for name in names if name not in files])


def _is_bundle(folder: Path) -> bool:
    """Whether a folder brings its own code, which its config names."""
    path = folder / "config.json"
    return path.is_file() and "auto_map" in json.loads(path.read_text(encoding="utf-8"))


def _text_on_hub(api: HfApi, repo_id: str, revision: str | None, token: str | bool | None) -> str | None:
    """Return the README.md that is on the hub, None where there is none or only what transformers put there."""
    try:
        path = api.hf_hub_download(repo_id, README, revision=revision, token=token)
    except RemoteEntryNotFoundError:  # and nothing else: a lost connection must not cost anybody their words
        return None
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    empty = ModelCard.from_template(ModelCardData(library_name="transformers"), model_description=PLACEHOLDER)
    return None if _body(text) == _body(str(empty)) else text


def _body(text: str) -> str:
    return ModelCard(text, ignore_metadata_errors=True).text.strip()


def _card(own: str, there: str | None, repo_id: str, tags: Iterable[str] | None) -> bytes | None:
    """Return the README.md to upload, None where that on the hub is somebody's and the one here is only generated."""
    if there is not None and not is_edited(own):
        merged = merge_texts(there, own)
        if merged is None:
            return None
        own = merged
    if tags is not None:
        card = ModelCard(own, ignore_metadata_errors=True)
        card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *tags]))
        own = str(card)
    return own.replace(HERE, f'folder = "{repo_id}"').encode()


def _without_paths(path: Path) -> bytes:
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = public(content.get("base_model_name_or_path"))
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


# ---- at the end of a run ----------------------------------------------------------------------------------------------


def check_upload(options: HubOptions) -> None:
    """Make the repository before a run, so that a wrong name or a missing right ends it now and not after it."""
    if options.push_to_hub is None:
        return
    try:
        HfApi(library_name="hfcustom").create_repo(options.push_to_hub, private=not options.hub_public, exist_ok=True)
    except Exception as error:  # the network, the hub, the token: whatever it is, nothing has been trained yet
        raise ConfigError(
            f"push_to_hub={options.push_to_hub!r} cannot be written to ({reason(error)}). Nothing was trained. Log in with "
            "`hf auth login`, check the name, or leave it out and `hfcustom push` afterwards."
        ) from error


def upload_result(options: HubOptions, folder: Path) -> str:
    """Upload what a run has left; return where it is. UploadError names the command to try again; the folder stays."""
    assert options.push_to_hub is not None
    try:
        commit = push_folder(
            folder, options.push_to_hub, private=not options.hub_public, revision=options.hub_revision
        )
    except Exception as error:  # what was trained is saved; whatever went wrong, it can be tried again
        words = ["hfcustom", "push", str(folder), options.push_to_hub]
        words += ["--revision", options.hub_revision] if options.hub_revision else []
        words += ["--public"] if options.hub_public else []
        raise UploadError(
            f"The model is safe in {folder}, but was not uploaded: {reason(error)}\nTry again: {shlex.join(words)}"
        ) from error
    return str(commit.commit_url)


def reason(error: Exception) -> str:
    """Return an error in one line."""
    return " ".join(printable(f"{type(error).__name__}: {error}", 400).split())
