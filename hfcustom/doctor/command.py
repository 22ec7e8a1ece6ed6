"""hfcustom doctor: findings as they come, a line each, then what is wrong with its cure; JSON, or a page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hfcustom.doctor.examine import examine
from hfcustom.doctor.finding import CHECKS, Finding
from hfcustom.naming import load_object
from hfcustom.report import Report

EXIT_FAILED, EXIT_USAGE = 1, 2


def show_doctor(options: argparse.Namespace) -> int:
    """Examine a target as `hfcustom doctor` was asked to; return 0, 1 where a check failed, 2 for what cannot be examined."""
    if options.list:
        for name, check in CHECKS.items():
            print(f"{name:<20}{check.expected}")
        return 0
    out = sys.stderr if options.json else sys.stdout
    findings = []
    try:
        if options.custom:
            load_object(options.custom, "model")
        for finding in examine(options.target, options.check or ()):
            findings.append(finding)
            print(line_of(finding), file=out, flush=True)
    except (FileNotFoundError, ImportError, AttributeError, TypeError, ValueError) as error:
        print(f"hfcustom doctor: {error}", file=sys.stderr)
        return EXIT_USAGE
    if options.json:
        found = [finding.to_dict() for finding in findings]
        print(json.dumps({"target": options.target, "findings": found}, indent=2))
    else:
        print(closing(findings))
    if options.html:
        write_page(Path(options.html), options.target, findings)
        print(f"The page is {options.html}.", file=sys.stderr)
    return EXIT_FAILED if any(finding.status == "failed" for finding in findings) else 0


def line_of(finding: Finding) -> str:
    """Return a finding as one line, and under a failed one what was expected, why that matters and the cure."""
    line = f"{finding.status:<9}{finding.check:<19}{finding.seconds:5.1f} s  {finding.measured}"
    if finding.status != "failed":
        return line
    facts = {"expected": finding.expected, "why": finding.why, "cure": finding.cure}
    return "\n".join([line, *(f"         {name + ':':<10}{text}" for name, text in facts.items())])


def closing(findings: Sequence[Finding]) -> str:
    """Return the last line: how many checks ended how, and in what time."""
    counts = {status: sum(finding.status == status for finding in findings) for status in ("ok", "failed", "skipped")}
    seconds = sum(finding.seconds for finding in findings)
    return ", ".join(f"{count} {status}" for status, count in counts.items()) + f" in {seconds:.0f} s"


def write_page(path: Path, target: str, findings: Sequence[Finding]) -> None:
    """Write the findings as a page, what failed first."""
    report = Report(f"hfcustom doctor {target}")
    report.text(closing(findings))
    for finding in findings:
        if finding.status == "failed":
            report.heading(f"{finding.check} failed")
            facts = (("measured", finding.measured), ("expected", finding.expected), ("why", finding.why))
            report.table(("", ""), [*facts, ("cure", finding.cure)])
    report.heading("All checks")
    rows = [(f.status, f.check, f.measured, f.expected, round(f.seconds, 1)) for f in findings]
    report.table(("", "check", "measured", "expected", "seconds"), rows)
    report.write(path)
