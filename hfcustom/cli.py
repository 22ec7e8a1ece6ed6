"""The command `hfcustom`: one small function a command, in COMMANDS; nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from hfcustom.naming import unknown


def families(argv: Sequence[str]) -> int:
    """List the families: checkpoints, parameters by part, tokens of an image, seams, what is verified."""
    parser = argparse.ArgumentParser(prog="hfcustom families", description=families.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a family, or a model that is no family (molmo-0924)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    from hfcustom.family_table import show_families

    return show_families(options.names, as_json=options.json)


def _add_rows(parser: argparse.ArgumentParser) -> None:
    """Add what training knows of the same names: how its rows are read, and which of their tokens are trained on."""
    add = parser.add_argument
    add("--split", help="split of the rows where there are several; by default train")
    add("--max-frames", type=int, default=8, help="frames of a video that are seen (default: 8)")
    add("--frame-method", default="uniform", help="which frames those are (default: uniform)")
    add("--video-as-images", action="store_true", help="give the frames of a video to the model as images")
    add("--image-root", metavar="DIR", help="where the images are, if not below the folder of the rows")
    add("--image-hosts", nargs="+", default=[], metavar="HOST", help="hosts from which images at URLs are fetched")
    add("--image-downloads", metavar="DIR", help="where those are kept; by default hfcustom/images in HF_HOME")
    add("--train-on", choices=("assistant", "last", "all"), default="assistant", help="as in training")
    add("--allowed-tokens", nargs="+", default=[], metavar="TOKEN", help="as in training")


def _add_custom(parser: argparse.ArgumentParser) -> None:
    """Add what a folder needs whose class is the user's."""
    parser.add_argument(
        "--custom", metavar="FILE.py:CLASS", help="import this first: the class that wrote the folder, if it is yours"
    )


def preflight(argv: Sequence[str]) -> int:
    """Check rows before a run: what training would refuse, duplicates, leaks, lengths; writes bad_rows.jsonl."""
    parser = argparse.ArgumentParser(
        prog="hfcustom preflight",
        description=preflight.__doc__,
        epilog="Exit codes: 0 training can use every row (there may be warnings); 1 it would stop at a row, unless told to skip "
        "such rows; 4 more rows than --max-bad-share are bad, so that it would stop even then; 2 wrong usage; 7 interrupted, go "
        "on with --resume. `recipes/finetune.py --exclude bad_rows.jsonl` leaves out the rows with errors.",
    )
    parser.add_argument(
        "data", help="rows: a file, a folder, a name on the hub, or a JSON mapping of several to weights"
    )
    _add_rows(parser)
    reader = parser.add_mutually_exclusive_group()
    reader.add_argument(
        "--model", help="folder or hub id whose processor reads the rows: tokens, labels, tiles, lengths"
    )
    reader.add_argument("--family", help="a family, with its published image settings and a small tokenizer")
    parser.add_argument("--eval", dest="eval_data", metavar="DATA", help="held-out rows, which training must not hold")
    parser.add_argument("--eval-split", help="split of the held-out rows where there are several; by default train")
    parser.add_argument("--max-length", type=int, help="longest row in tokens; needs --model or --family")
    parser.add_argument("--min-pixels", type=int, default=16, help="fewest pixels of an image (default: 16)")
    parser.add_argument("--captions", action="store_true", help="rows of an image and its text, for CLIP or SigLIP")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of the costliest batch (default: 8)")
    parser.add_argument("--max-bad-share", type=float, default=0.01, help="as in training (default: 0.01)")
    parser.add_argument("--workers", type=int, help="processes; 0 for none; by default one a processor if it pays")
    parser.add_argument("--output", default="bad_rows.jsonl", help="one line a finding (default: bad_rows.jsonl)")
    parser.add_argument("--plot", metavar="FILE.png", help="histograms of lengths and tiles; needs matplotlib")
    parser.add_argument("--resume", action="store_true", help="go on with a scan that was interrupted")
    parser.add_argument("--overwrite", action="store_true", help="forget a scan that was interrupted")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    from hfcustom.preflight import run_preflight

    return run_preflight(options)


def frames(argv: Sequence[str]) -> int:
    """Choose frames of a video by one of several methods, or compare the methods on it."""
    parser = argparse.ArgumentParser(prog="hfcustom frames", description=frames.__doc__)
    add = parser.add_argument
    add("clip", nargs="?", help="a video, a folder of pictures, an animated GIF, WEBP or PNG, a TIFF, a .npy array")
    add(
        "--example",
        action="store_true",
        help="a clip drawn on the spot, whose cuts are known, instead of one of yours",
    )
    add("--method", help="uniform, unless named; a wrong name lists all; file.py:function for your own")
    add("-k", type=int, default=8, help="how many frames (default 8)")
    add("--query", metavar="TEXT", help="what to look for, with the method query")
    add("--model", help="a CLIP or SigLIP, a name or a folder, for the methods embedding and query")
    add("--fps", type=float, help="frames for each second of the clip, with the method fps (default 1)")
    add("--clip-fps", type=float, help="frames a second of the clip, where it does not state that")
    add("--max-candidates", type=int, help="frames looked at: of a longer clip every second, third, ... one")
    add("--batch-size", type=int, help="frames embedded together (default 16)")
    add("--compare", action="store_true", help="run every method that has what it needs")
    add("--cuts", type=int, nargs="+", metavar="FRAME", help="first frames of scenes: how many does a method cover?")
    add("--output", metavar="SHEET", help="write a contact sheet: .png, .jpg or .webp")
    add("--frames-dir", metavar="DIR", help="write the chosen frames there, at their full size")
    add("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    from hfcustom.frames_command import run_frames

    return run_frames(options)


def inspect(argv: Sequence[str]) -> int:
    """Show what a model makes of an image: tokens, tiles, preprocessing, switches, the tensors of a batch; draw it."""
    parser = argparse.ArgumentParser(
        prog="hfcustom inspect",
        description=inspect.__doc__,
        epilog="Nothing is looked up: the processor is run, recorded, and its settings are tried one by one. No weights are loaded.",
    )
    add = parser.add_argument
    add(
        "targets",
        nargs="*",
        metavar="TARGET",
        help="a family, a folder or hub id, my_file.py:MyModel; two are compared",
    )
    add("--image", metavar="FILE", help="a picture; without one, a drawn one")
    add("--size", metavar="WxH", help="size of the drawn one in pixels (default: 800x1300)")
    add("--plot", metavar="FILE.png", help="draw the image with its tiles and tokens, and what the tower gets")
    add("--html", metavar="FILE.html", help="write a page with the drawing")
    add("--markdown", action="store_true", help="print Markdown")
    add("--json", action="store_true", help="print JSON")
    add("--all", action="store_true", help="every family, as Markdown or JSON: docs/families.md")
    options = parser.parse_args(argv)
    from hfcustom.inspector.command import show_inspection

    return show_inspection(options)


def lens(argv: Sequence[str]) -> int:
    """Show what the model sees of a row: tokens, roles, tiles, labels; exit code 1 for a label on an image token."""
    parser = argparse.ArgumentParser(prog="hfcustom lens", description=lens.__doc__)
    parser.add_argument("data", nargs="?", help="rows: a file, a folder, a name; or spell one out with --question")
    _add_rows(parser)
    reader = parser.add_mutually_exclusive_group(required=True)
    reader.add_argument("--model", help="folder or hub id whose processor reads the rows")
    reader.add_argument("--family", help="a family, with its published image settings and a small tokenizer")
    parser.add_argument("--row", type=int, nargs="+", default=[0], help="rows to show, counted from 0 (default: 0)")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="pictures of a row that is spelled out")
    parser.add_argument("--question", default="", help="what the user says in a row that is spelled out")
    parser.add_argument("--answer", default="", help="what the assistant says in it")
    parser.add_argument("--collate", metavar="FILE.py:NAME", help="your own: NAME(processor) returns rows -> batch")
    parser.add_argument(
        "--compare", metavar="ROW|MODEL|FAMILY", help="show another row, or the row as another model gets it"
    )
    parser.add_argument("--page", metavar="FILE.html", help="write a page with the pictures and their tiles")
    parser.add_argument("--all", action="store_true", help="a line for each token, image tokens too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if (options.data is None) == (not options.question):
        parser.error("give a data file, or spell a row out with --question, --answer and --image")
    from hfcustom.lens import show_lens

    return show_lens(options)


def doctor(argv: Sequence[str]) -> int:
    """Prove on a small copy that a model is in effect, correct and loads elsewhere; exit code 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="hfcustom doctor", description=doctor.__doc__)
    parser.add_argument("target", nargs="?", help="a family, a folder or hub id, or my_file.py:MyModel")
    _add_custom(parser)
    parser.add_argument("--check", nargs="+", metavar="NAME", help="run these checks only")
    parser.add_argument("--list", action="store_true", help="list the checks and what each expects")
    parser.add_argument("--json", action="store_true", help="print JSON; progress goes to the error stream")
    parser.add_argument("--html", metavar="FILE.html", help="write a page")
    options = parser.parse_args(argv)
    if (options.target is None) == (not options.list):
        parser.error("name a target: a family, a folder or hub id, or my_file.py:MyModel; or give --list")
    from hfcustom.doctor.command import show_doctor

    return show_doctor(options)


def bundle(argv: Sequence[str]) -> int:
    """Put a checkpoint and its code in one folder that loads where hfcustom is not installed; exit code 1 if it does not."""
    parser = argparse.ArgumentParser(
        prog="hfcustom bundle",
        description=bundle.__doc__,
        epilog="The folder loads through AutoConfig, AutoModel, AutoProcessor and pipeline() with trust_remote_code=True. It holds "
        "the weights, the processor, the code as flat files with relative imports, and only what of it the model needs. "
        "Exit codes: 0 written; 1 a process without hfcustom computes something else, and nothing is written; 2 it cannot be "
        "bundled, and the message says why.",
    )
    parser.add_argument("checkpoint", help="folder or hub id of a saved model of a custom class")
    parser.add_argument("out", help="folder to write, which must not exist, or be empty")
    parser.add_argument(
        "--code",
        nargs="+",
        default=[],
        metavar="FILE.py",
        help="your files that define the class, and its losses if elsewhere",
    )
    parser.add_argument(
        "--verify",
        choices=("auto", "full", "small"),
        default="auto",
        help="compare the whole model, or a small copy of it (default: auto, whole up to 4 GiB)",
    )
    parser.add_argument("--no-verify", action="store_true", help="write it without loading it")
    options = parser.parse_args(argv)
    from hfcustom.bundle.command import run_bundle

    return run_bundle(options)


def plan(argv: Sequence[str]) -> int:
    """Say what a training run takes of a GPU's memory, where it fits and what to change, without running it."""
    description = (
        f"{plan.__doc__}\n\n    hfcustom plan [RECIPE.py] [my_file.py:MyModel] --model ID --tokens 2048 --crops 4 --lora --gpu "
        "h100\n\nEvery option of the recipe (recipes/finetune.py unless another is named) is one of the plan too, also out of a "
        "--config file.\nExit codes: 0; 1 where the GPU that --gpu or --memory names is too small; 2 and 3 for a mistake."
    )
    if {"-h", "--help"} & set(argv):
        from hfcustom.options import read
        from hfcustom.plan.config import PlanFields

        read(PlanFields, description, ["--help"])  # type: ignore[type-var]  # leaves here
    from hfcustom.plan.command import run_plan

    return run_plan(argv, description)


def card(argv: Sequence[str]) -> int:
    """Print the change card of a model: what its class overrides and adds, what was trained on what, how to load it."""
    parser = argparse.ArgumentParser(prog="hfcustom card", description=card.__doc__)
    parser.add_argument(
        "target", help="a folder or hub id, whose weights are not read, a family, or my_file.py:MyModel"
    )
    _add_custom(parser)
    parser.add_argument(
        "--write", action="store_true", help="put it into the folder's README.md; one of your own stays"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    from hfcustom.card_command import show_card

    return show_card(options)


def push(argv: Sequence[str]) -> int:
    """Upload a saved model: weights, processor, change card; nothing of a checkpoint's optimiser, no hidden file."""
    parser = argparse.ArgumentParser(prog="hfcustom push", description=push.__doc__)
    parser.add_argument("folder", help="what save_pretrained, fit() or a recipe wrote, with config.json in it")
    parser.add_argument("name", help="owner/name on the hub; made where there is none")
    parser.add_argument("--public", action="store_true", help="if it is made, let everybody see it (default: private)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to (default: main)")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, and stop")
    options = parser.parse_args(argv)
    from hfcustom import card_command

    return card_command.push(options)


def export(argv: Sequence[str]) -> int:
    """Write a checkpoint, its adapter merged, as its stock class would have: for every server and every other reader."""
    parser = argparse.ArgumentParser(
        prog="hfcustom export",
        description=export.__doc__,
        epilog="Exit codes: 0 done; 1 the stock class would compute something else, or what was written does not load as it "
        "should (nothing is left); 2 no such checkpoint, or OUT is not empty. One copy of the weights is in memory.",
    )
    parser.add_argument("checkpoint", help="folder or hub id: a model, or an adapter that names its base")
    parser.add_argument("out", help="a folder that is not there yet, or is empty")
    parser.add_argument("--base", help="the full-precision base of an adapter, if not where the adapter says")
    _add_custom(parser)
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as the weights are)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file (default: 5GB)")
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="export although the stock class lacks methods or modules of yours: what they compute is left out",
    )
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not load the result in a process without hfcustom"
    )
    options = parser.parse_args(argv)
    from hfcustom.export.command import run_export

    return run_export(options)


def lint_serving(argv: Sequence[str]) -> int:
    """Say whether a server (vLLM's Transformers backend) runs a customisation, with the line that it ignores or stops at."""
    parser = argparse.ArgumentParser(
        prog="hfcustom lint-serving",
        description=lint_serving.__doc__,
        epilog="Exit codes: 0 no error (there may be warnings); 1 an error; 2 wrong usage. Nothing is served and no server is "
        "needed: classes are built without weights and their source is read.",
    )
    parser.add_argument("target", nargs="?", help="my_file.py:MyModel, a family, a folder or hub id")
    _add_custom(parser)
    parser.add_argument("--list", action="store_true", help="list the rules")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if (options.target is None) == (not options.list):
        parser.error("name a target: my_file.py:MyModel, a family, a folder or hub id; or give --list")
    from hfcustom.serving.command import run_lint

    return run_lint(options)


def runs(argv: Sequence[str]) -> int:
    """Compare trainings: steps, seconds, newest and best numbers, options that differ."""
    parser = argparse.ArgumentParser(
        prog="hfcustom runs",
        description=runs.__doc__,
        epilog="Beside the newest value stands of a loss the lowest, of what an evaluation returned the highest, with its step; "
        "--json has both of every number. Exit codes: 0 done; 2 wrong usage, or no run in a folder.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="output_dir of a training, or a folder of such")
    parser.add_argument("--html", metavar="FILE", help="write a page with every curve, too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    from hfcustom.runs.command import run_runs

    return run_runs(options)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "bundle": bundle,
    "card": card,
    "doctor": doctor,
    "export": export,
    "families": families,
    "frames": frames,
    "inspect": inspect,
    "lens": lens,
    "lint-serving": lint_serving,
    "plan": plan,
    "preflight": preflight,
    "push": push,
    "runs": runs,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, or 2 for a mistake on the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: hfcustom COMMAND ...\n\ncommands:")
        for name, command in COMMANDS.items():
            print(f"  {name:<14}{command.__doc__}")
        print("\nhfcustom COMMAND --help says more; training is in recipes/.")
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from hfcustom import __version__

        print(f"hfcustom {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"hfcustom: {unknown('command', argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    return COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
