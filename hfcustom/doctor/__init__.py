"""hfcustom doctor: prove that a customised model is in effect, correct and loads elsewhere, on a small copy of it.

target -> Patient (patient.py) -> checks (one file a subject, CHECKS in finding.py) -> Finding, ... -> terminal, JSON, page.
"""
