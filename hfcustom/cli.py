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


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"families": families}


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
