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


def preflight(argv: Sequence[str]) -> int:
    """Check rows before a run: what training would refuse, duplicates, leaks, lengths; writes bad_rows.jsonl."""
    parser = argparse.ArgumentParser(
        prog="hfcustom preflight",
        description=preflight.__doc__,
        epilog="Exit codes: 0 training can use every row (there may be warnings); 1 it would stop at a row, unless told to skip "
        "such rows; 4 more rows than --max-bad-share are bad, so that it would stop even then; 2 wrong usage; 7 interrupted, go "
        "on with --resume. `recipes/finetune.py --exclude bad_rows.jsonl` leaves out the rows with errors.",
    )
    parser.add_argument("data", help="rows: a .jsonl file, a folder of `datasets`, or a name on the hub")
    parser.add_argument("--split", help="split of the rows where there are several; by default train")
    reader = parser.add_mutually_exclusive_group()
    reader.add_argument(
        "--model", help="folder or hub id whose processor reads the rows: tokens, labels, tiles, lengths"
    )
    reader.add_argument("--family", help="a family, with its published image settings and a small tokenizer")
    parser.add_argument("--eval", dest="eval_data", metavar="FILE", help="held-out rows, which training must not hold")
    parser.add_argument("--eval-split", help="split of the held-out rows where there are several; by default train")
    parser.add_argument("--max-length", type=int, help="longest row in tokens; needs --model or --family")
    parser.add_argument("--min-pixels", type=int, default=16, help="fewest pixels of an image (default: 16)")
    parser.add_argument("--train-on", choices=("assistant", "last", "all"), default="assistant", help="as in training")
    parser.add_argument("--allowed-tokens", nargs="+", default=[], metavar="TOKEN", help="as in training")
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


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"families": families, "preflight": preflight}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, or 2 for a mistake on the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: hfcustom COMMAND ...\n\ncommands:")
        for name, command in COMMANDS.items():
            print(f"  {name:<12}{command.__doc__}")
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
