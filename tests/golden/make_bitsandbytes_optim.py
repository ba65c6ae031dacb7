"""Makes bitsandbytes_optim.npz: what bitsandbytes (PyTorch, on a CPU) makes of fixed gradients with 8-bit states.

  pip install "torch==2.13.0" numpy && pip install "bitsandbytes==0.50.0" && python tests/golden/make_bitsandbytes_optim.py

The two dynamic maps, and for three steps of `Adam8bit` (with decoupled weight decay, as `AdamW8bit` has it too) and of `Lion8bit` on one
array whose last block is short: the parameters, the codes and the largest magnitudes of the blocks. The third gradient has zeros, so that
states decay; the spread of the gradients reaches values that the unsigned map rounds to zero.

Its float32 code for CPUs looks codes up in a table that is coarse near zero (up to 15 codes off); here states go through its own code for
float64, which takes the nearest level.
"""

from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import torch
from bitsandbytes.backends.cpu import ops
from bitsandbytes.functional import create_dynamic_map

SHAPE = (4, 1090)


def store_nearest(x, levels, absmax, codes, block):
    found = torch.ops.bitsandbytes.quantize_blockwise(x.double(), levels, block)
    codes.copy_(found[0])
    absmax.copy_(found[1])


def main():
    ops._quant_blockwise_fp32_direct = store_nearest
    rng = np.random.default_rng(11)
    start = rng.standard_normal(SHAPE).astype(np.float32)
    gradients = (rng.standard_normal((3, *SHAPE)) * np.exp(3 * rng.standard_normal(SHAPE) - 4)).astype(np.float16).astype(np.float32)
    gradients[2] *= rng.random(SHAPE) < 0.7
    found = {"start": start, "gradients": gradients.astype(np.float16)}
    found["signed"], found["unsigned"] = (create_dynamic_map(signed=signed).numpy() for signed in (True, False))
    kinds = {
        "adam": lambda p: bnb.optim.AdamW8bit([p], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1),
        "lion": lambda p: bnb.optim.Lion8bit([p], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1),
    }
    for name, kind in kinds.items():
        p = torch.nn.Parameter(torch.tensor(start))
        optimizer = kind(p)
        for i, g in enumerate(gradients):
            p.grad = torch.tensor(g)
            optimizer.step()
            state = optimizer.state[p]
            found[f"{name}/{i}/p"] = p.detach().numpy().copy()
            for key in ("state1", "absmax1", "state2", "absmax2"):
                if state.get(key) is not None:
                    found[f"{name}/{i}/{key}"] = state[key].numpy().copy()
    np.savez_compressed(Path(__file__).parent / "bitsandbytes_optim.npz", **found)


if __name__ == "__main__":
    main()
