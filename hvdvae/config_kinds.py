"""What a later launch may change of a run: every key of the configuration stands in one of these lists.

A checkpoint holds the configuration that it was trained with. FUNCTION, FIXED and BY_DATA are compared with it.
"""

FUNCTION = ("model", "hidden", "latent", "activation", "batch_norm", "likelihood", "sigma", "binarization")
"""What the trained numbers compute. With another value they may fit all the same, and be another function."""
FIXED = ("seed", "optimizer")
"""Data order and noise follow from the one, and what the saved state means from the other."""
BY_DATA = ("data", "validation", "external_storage")
"""Compared by the digest of the training examples: a file may move."""
CHANGEABLE = (
    *("objective", "samples", "beta", "beta_warmup", "free_bits"),
    *("epochs", "batch_size", "accumulate", "lr", "lr_scaling", "warmup", "schedule", "step_epochs", "gamma"),
    *("momentum", "eps", "weight_decay", "clip_norm", "ema", "skip_limit"),
    *("strategy", "engine", "compression", "compression_share", "compression_rank", "compression_momentum"),
    *("sync_every", "adaptive_sync", "group_size", "outer_lr", "outer_momentum", "zero_stage", "weights"),
    *("tensor", "pipeline", "micro_batches", "pipeline_schedule", "recompute", "cuts", "mesh", "reduce_op"),
    *("sync_batch_norm", "servers", "consistency", "staleness", "backup_workers", "replicas", "rule"),
    *("dc_strength", "elasticity", "push_every", "fetch_every", "prefetch", "precision"),
)
"""How training goes on: whoever resumes with another value wants it, and the opening of the run names it."""
OF_A_LAUNCH = (
    *("out", "resume", "overwrite", "device", "threads", "compile", "channels_last", "deadline", "replace_workers"),
    *("validate_every", "checkpoint_every", "keep", "nll_samples", "pictures_every"),
)
"""Where and how the work is done, what is written, and how often: not what comes out."""
