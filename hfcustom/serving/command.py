"""What `hfcustom lint-serving` prints: each finding with its line, why a server minds, and the cure; what survives of each seam."""

from __future__ import annotations

import argparse
import json
import sys

from hfcustom.base import CustomVLM
from hfcustom.doctor.examine import quiet
from hfcustom.export.departures import find_departures
from hfcustom.origins import is_users
from hfcustom.serving import around, inside, outside, replay
from hfcustom.serving.finding import RULES, Finding
from hfcustom.serving.target import Served, find_target

EXIT_FAILED, EXIT_USAGE = 1, 2
REPLAY = "replay"
FILES = (outside, inside, around, replay)  # imported: their rules are in RULES
SEAMS = {  # of CustomVLM, none of which is in the inner model
    "vision features": "transform_vision_features",
    "merged embeddings": "transform_embeddings",
    "hidden states": "transform_hidden_states",
}


def lint(target: str) -> tuple[Served, list[Finding]]:
    """Return what is served and what breaks a rule; errors as of `find_target`, ValueError for a class that cannot be built."""
    served = find_target(target)
    with quiet():
        try:
            _ = served.model, served.alone, served.stock
        except Exception as error:  # whatever a user's __init__ raises
            raise ValueError(
                f"{served.model_class.__name__} cannot be built from its config on the meta device ({type(error).__name__}: "
                f"{error}), and a server builds it so. Read no values of weights in __init__."
            ) from error
        return served, look(served)


def look(served: Served) -> list[Finding]:
    """Return what breaks a rule; the model is run only where reading it has found no error."""
    findings = [finding for name, rule in RULES.items() if name != REPLAY for finding in rule(served)]
    if not any(finding.level == "error" for finding in findings):
        findings += RULES[REPLAY](served)
    return findings


def was_replayed(served: Served) -> str:
    """Return what running the model as a server does has shown, in words."""
    try:
        difference = replay.measured(served)
    except replay.CannotReplay:
        return "not run: this needs a class of a family whose stock class is served as it is"
    return "run as a server runs it, " + (
        "logits equal bit for bit" if not difference else f"logits differ by {difference:.1e}"
    )


def seams(served: Served) -> dict[str, str]:
    """Return what becomes of each seam on a server, by where the class has it."""
    if not isinstance(served.model, CustomVLM):
        return {}
    found = {}
    for seam, method in SEAMS.items():
        own = getattr(served.model_class, method) is not getattr(CustomVLM, method)
        found[seam] = f"lost: {method} is outside of the inner model" if own else "as stock"
    connector = served.model.config.connector
    found["connector"] = f"lost: {connector!r} is outside of the inner model" if connector is not None else "as stock"
    inner = type(served.inner)
    found["inner model"] = f"survives: {inner.__name__} is built by the server" if is_users(inner) else "as stock"
    found["loss"] = "not needed: a server computes none"
    return found


def exports(served: Served) -> bool:
    """Whether `hfcustom export` makes a checkpoint of the stock class, which needs none of these rules."""
    if not isinstance(served.model, CustomVLM):
        return False
    try:
        return not find_departures(served.model_class, served.config)
    except ValueError:  # its parent is no class of transformers
        return False


def run_lint(options: argparse.Namespace) -> int:
    """Lint a target; return 0, 1 where there is an error, 2 for what is no target."""
    if options.list:
        for name, rule in RULES.items():
            print(f"{name:<20}{rule.asks}")
        return 0
    try:
        if options.custom:
            from hfcustom.naming import load_object

            load_object(options.custom, "model")
        served, findings = lint(options.target)
    except (FileNotFoundError, ImportError, AttributeError, TypeError, ValueError) as error:
        print(f"hfcustom lint-serving: {error}", file=sys.stderr)
        return EXIT_USAGE
    errors = [finding for finding in findings if finding.level == "error"]
    kept, can_export = seams(served), exports(served)
    if options.json:
        found = [finding.to_dict() for finding in findings]
        content = {"target": options.target, "findings": found, "seams": kept, "export": can_export}
        print(json.dumps(content, indent=2))
        return EXIT_FAILED if errors else 0
    for finding in findings:
        print(finding)
    for seam, fate in kept.items():
        print(f"seam     {seam:<20}{fate}")
    if not errors:
        with quiet():
            shown = was_replayed(served)
        print(f"replay   {shown}")
    if can_export:
        print(
            "`hfcustom export` makes a checkpoint of the stock class of this, which every server loads as it loads the stock one."
        )
    print(f"{len(errors)} errors, {len(findings) - len(errors)} warnings by {len(RULES)} rules")
    return EXIT_FAILED if errors else 0
