"""What experiments that train the language model on these texts share: which windows are read when, and the loss."""

import jax.numpy as jnp
import numpy as np
import optax

from qjax.evaluation import encode, windows

HELD_OUT = 0.12


def split(tokenizer, files):
    """Windows to train on, of the beginning of each text, and to measure on, of its last part."""
    seen, held = [], []
    for file in files:
        text = file.read_text(encoding="utf-8")
        cut = text.index("\n", int(len(text) * (1 - HELD_OUT)))
        seen.append(windows(encode(tokenizer, text[:cut])))
        held.append(windows(encode(tokenizer, text[cut:])))
    return np.concatenate(seen), np.concatenate(held)


def batches_of(seen, steps, batch, seed=0):
    """(steps, batch, 256): the same for everything that is compared; each window once an epoch."""
    draw, order = np.random.default_rng(seed), []
    while len(order) < steps * batch:
        order += list(draw.permutation(len(seen)))
    return jnp.asarray(seen[np.asarray(order[: steps * batch])].reshape(steps, batch, -1))


def cross_entropy(logits, tokens):
    """Mean over the tokens that have one before them."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), tokens[:, 1:]).mean()
