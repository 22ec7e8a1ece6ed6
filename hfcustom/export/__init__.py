"""hfcustom export: a custom checkpoint, adapters merged, as its stock parent would have saved it; or why that cannot be.

checkpoint -> Source (source.py) -> what the parent would not compute (departures.py) -> the parent's weights, config and
processor in a folder (write.py) -> loaded by a process that has no hfcustom (verify.py, child.py) -> OUT.
"""
