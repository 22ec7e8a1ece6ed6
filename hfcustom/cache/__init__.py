"""Nothing is computed twice: what image processors and frozen vision towers make of an image, kept in a folder.

run.py is what fit() and the collator use; pictures.py and features.py are the two caches, store.py the files of both.
"""
