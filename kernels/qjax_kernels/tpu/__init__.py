"""Pallas kernels for TPU. One kernel a file, each beside its `why_not(request)`; `chips` and `tiles` hold what they share.

Weights are (K, N) here, native `jnp.int4` or int8: a group's scales then lie along lanes as the weight's columns do, and a group needs a
copy of one row along sublanes; with (N, K) the same tile takes 1.4x to 1.8x the instructions (experiments/kernels).
"""
