"""Names of the metrics that a run reports.

``kl`` and ``ppl`` are measured on the validation split. Validation never selects anything: the winner was chosen by
its loss on search tokens.
"""

KL = "kl"  # nats a token from the dense model, on validation
PPL = "ppl"  # on validation
DENSE_PPL = "dense_ppl"
BITS_PER_WEIGHT = "bits_per_weight"  # true bits: codes, scales, zeros, masks
SIZE_MB = "size_mb"  # 10^6 bytes of the whole model
SPARSITY = "sparsity"  # share of weights removed
TOKENS = "tokens"  # scored by the search, and by what was measured for it
TOKENS_SAVED = "tokens_saved"  # that racing did not score
SECONDS = "seconds"
DENSE_BITS_PER_WEIGHT = "dense_bits_per_weight"
DENSE_SIZE_MB = "dense_size_mb"
COVERAGE = "coverage"  # share of the weights of the model's blocks that is in units

METRICS = (
    KL,
    PPL,
    DENSE_PPL,
    BITS_PER_WEIGHT,
    SIZE_MB,
    SPARSITY,
    TOKENS,
    TOKENS_SAVED,
    SECONDS,
    DENSE_BITS_PER_WEIGHT,
    DENSE_SIZE_MB,
    COVERAGE,
)
