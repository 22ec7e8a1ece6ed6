"""`hfcustom inspect`: what a model makes of pictures, found out by running its processor and counting its modules.

Nothing here knows a family: stages are recorded while the processor runs, tiles are found by sending it a picture whose
colours say where they are, switches by trying them, axes by changing the batch. See examine.py for the order of things.
"""
