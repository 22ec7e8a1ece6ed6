"""`hfcustom bundle`: a checkpoint and all code that it needs in one folder, which loads where hfcustom is not installed.

source.py reads a file, reach.py finds what a class needs of which files, rewrite.py writes that as flat modules with relative
imports, folder.py lays out the folder, verify.py loads it in a process that cannot import hfcustom.
"""
