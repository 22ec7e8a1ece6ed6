"""Random damage to the files of a checkpoint: what may happen to one, and what a resume then has to say and do.

python tests/faults/damage.py [DAMAGES]        # as `make faults` does
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Damage = Callable[[Path, Path, random.Random], str]  # the file, the checkpoint before, dice -> what must be named


def flip_a_bit(file: Path, other: Path, dice: random.Random) -> str:
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(bytes(content))
    return file.name


def cut_off(file: Path, other: Path, dice: random.Random) -> str:
    content = file.read_bytes()
    file.write_bytes(content[: dice.randrange(len(content))])
    return file.name


def zero_a_block(file: Path, other: Path, dice: random.Random) -> str:
    content = bytearray(file.read_bytes())
    start = dice.randrange(len(content))
    block = min(len(content) - start, 512)
    content[start : start + block] = bytes(block) if any(content[start : start + block]) else b"\1" * block
    file.write_bytes(bytes(content))
    return file.name


def append(file: Path, other: Path, dice: random.Random) -> str:
    with file.open("ab") as end:
        end.write(dice.choice([b"\0", b"\n", b" ", dice.randbytes(100)]))
    return file.name


def delete(file: Path, other: Path, dice: random.Random) -> str:
    file.unlink()
    return file.name


def make_a_folder_of_it(file: Path, other: Path, dice: random.Random) -> str:
    file.unlink()
    file.mkdir()
    return file.name


def take_the_other_checkpoints(file: Path, other: Path, dice: random.Random) -> str:
    """Swap the file with that of the checkpoint before; where that is the same, with another of its own folder."""
    if other.is_file() and other.read_bytes() != file.read_bytes():
        shutil.copy(other, file)
        return file.name
    neighbour = next(path for path in sorted(file.parent.iterdir()) if path.is_file() and path != file)
    shutil.copy(neighbour, file)
    return file.name


def link_elsewhere(file: Path, other: Path, dice: random.Random) -> str:
    file.unlink()
    os.symlink("/nowhere/at/all", file)
    return file.name


def add_a_file(file: Path, other: Path, dice: random.Random) -> str:
    """Put a file beside it that nobody has written, such as weights that would be loaded too."""
    added = file.with_name(f"{dice.choice(['extra', 'model-00002', '.hidden'])}.safetensors")
    added.write_bytes(file.read_bytes())
    return added.name


DAMAGES: dict[str, Damage] = {
    "a bit": flip_a_bit,
    "cut off": cut_off,
    "zeros": zero_a_block,
    "longer": append,
    "deleted": delete,
    "a folder": make_a_folder_of_it,
    "swapped": take_the_other_checkpoints,
    "a link": link_elsewhere,
    "a file more": add_a_file,
}


def kinds_of_files() -> list[str]:
    """Return what a checkpoint of LoRA holds beside its manifest, the stream's position added."""
    return [
        "model/adapter_config.json",
        "model/adapter_model.safetensors",
        "model/base_fingerprint.json",
        "model/config.json",
        "model/tokenizer.json",
        "optimizer.json",
        "optimizer.safetensors",
        "rng-0.safetensors",
        "spikes.json",
        "state.json",
    ]


def two_checkpoints(folder: Path) -> tuple[Any, Path]:
    """Return saves that resume from a folder, and a good copy of it: steps 1 and 2, with the position of a stream."""
    from test_every_moment_of_a_save import Saves

    saves = Saves(folder / "run", resume=True)
    feed = saves.state.feed
    feed.save = lambda place: (place / "stream-0.json").write_text(json.dumps({"epoch": 0})) and None  # type: ignore
    for step in (1, 2):
        saves.save(step)
    shutil.copytree(saves.folder, folder / "good")
    return saves, folder / "good"


def wrongs(
    saves: Any,
    good: Path,
    count: int,
    printed: Callable[[], str],
    which: Sequence[tuple[str, str]] = (),
    seed: int = 0,
) -> list[str]:
    """Damage the newer checkpoint `count` times and resume; return what was not found, not named or not passed by."""
    dice, wrong = random.Random(seed), []
    newest, before = saves.state.folder / "step-000002", saves.state.folder / "step-000001"
    for at in range(count):
        shutil.rmtree(saves.folder, ignore_errors=True)
        shutil.copytree(good, saves.folder)
        files = sorted(path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file())
        kind, name = which[at % len(which)] if which else (dice.choice(list(DAMAGES)), dice.choice(files))
        named = DAMAGES[kind](newest / name, before / name, dice)
        printed()
        step, text = saves.resume(), printed()
        if step != 1 or f"set aside as damaged-{newest.name}" not in text or named not in text:
            wrong.append(f"{kind} of {name} (dice {seed}, {at}): resumed at {step}, named {named in text}: {text}")
    return wrong


def main(count: int) -> int:
    import contextlib
    import io
    import tempfile
    import time

    began, out = time.monotonic(), io.StringIO()

    def printed() -> str:
        text = out.getvalue()
        out.seek(0), out.truncate()
        return text

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out):
        wrong = wrongs(*two_checkpoints(Path(folder)), count, printed)
    print("".join(f"  {text}\n" for text in wrong), end="")
    print(
        f"{count - len(wrong)} of {count} damages to checkpoint files found before the first step, named, and passed by "
        f"({time.monotonic() - began:.0f} s)"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
