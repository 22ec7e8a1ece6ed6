"""hfcustom bundle: write a folder, have another process load it, and put it in its place only if that computes the same."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hfcustom.bundle.cargo import find_cargo
from hfcustom.bundle.code import Code
from hfcustom.bundle.folder import fill_folder
from hfcustom.bundle.verify import Verdict, verify

EXIT_FAILED, EXIT_USAGE = 1, 2


def write_bundle(
    checkpoint: str | Path,
    out: str | Path,
    code: Sequence[str | Path] = (),
    *,
    how: str = "auto",
    say: Callable[[str], None] = print,
) -> Verdict:
    """Write the bundle of a checkpoint to `out`, unless it is found not to be the model; return what was found.

    `how` it is verified: "auto", "full", "small" or "none". Raises ValueError, ImportError or FileNotFoundError for what cannot
    be bundled, and FileExistsError where `out` holds something.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already and not empty. Delete it, or name another folder.")
    cargo = find_cargo(checkpoint, code)
    for note in cargo.notes:
        say(note)
    flat = Code(cargo)
    for name in flat.left_out():
        say(f"Nothing of {name} is needed, so it is left out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        fill_folder(cargo, flat, partial)
        say(
            f"{len(flat.files)} files of code: {', '.join(flat.user_modules()) or 'none'} of yours, the rest hfcustom's"
        )
        if how != "none":
            say("Loading it in a process that can import neither hfcustom nor your files.")
        verdict = Verdict(["not verified"]) if how == "none" else verify(cargo, flat, partial, how)
        if not verdict.faults:
            partial.chmod(0o755)  # mkdtemp's are the owner's only
            if out.exists():
                out.rmdir()
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return verdict


def run_bundle(options: argparse.Namespace) -> int:
    """Write a bundle as `hfcustom bundle` was asked to; return 0, 1 where it is not the model, 2 for what cannot be bundled."""
    from hfcustom.doctor.examine import quiet

    out, how = sys.stdout, "none" if options.no_verify else options.verify
    try:
        with quiet():
            verdict = write_bundle(
                options.checkpoint,
                options.out,
                options.code,
                how=how,
                say=lambda text: print(text, file=out, flush=True),
            )
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"hfcustom bundle: {error}", file=sys.stderr)
        return EXIT_USAGE
    for fact in verdict.facts:
        print(fact)
    for fault in verdict.faults:
        print(f"FAILED: {fault}")
    if verdict.faults:
        print(f"{options.out} was not written.")
        return EXIT_FAILED
    print(f"{options.out} loads with trust_remote_code=True; requirements.txt in it says what it needs.")
    return 0
