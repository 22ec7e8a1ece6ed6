"""What a run of fit() (hfcustom/train.py) is made of: a step, its memory and its gradients, what is watched, checkpoints."""
