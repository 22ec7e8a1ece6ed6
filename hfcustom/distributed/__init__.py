"""Several processes: how long one waits for another, shards of a model (FSDP2, ZeRO), and work that ranks share."""
