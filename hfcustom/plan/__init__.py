"""hfcustom plan: what a training run needs of a GPU's memory, found by running its own code without weights.

config.py reads the options, weights.py builds the recipe's model without its weights, batches.py makes the longest batch,
measure.py runs one training step of it under simulation.py, state.py counts what is exact, sharding.py shares it over GPUs,
advice.py tries what could be changed, report.py prints.
"""
