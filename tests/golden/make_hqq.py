"""Makes hqq.npz: what hqq (PyTorch, on a CPU) makes of fixed weights, which the tests compare with and never need to run.

  pip install "torch==2.13.0" numpy && pip install --no-deps "hqq==0.2.8" && python tests/golden/make_hqq.py

For each of the weights (64 groups of 32 along the last axis; `wide` large enough for the shrinking to matter) and each width: codes, scale
(of which the weight is a multiple) and zero point of `Quantizer.quantize(axis=1, optimize=True)`, and the error of every step.
"""

from pathlib import Path

import numpy as np
import torch
from hqq.core.optimize import optimize_weights_proximal_legacy_step
from hqq.core.quantize import Quantizer


def main():
    rng = np.random.default_rng(7)
    weights = {"narrow": rng.standard_t(5, (64, 32)) * 0.02, "wide": rng.standard_normal((64, 32)) * 3}
    found = {}
    for name, w in weights.items():
        w = torch.tensor(w.astype(np.float32))
        found[name] = w.numpy()
        for bits in (2, 3, 4):
            codes, meta = Quantizer.quantize(w.clone(), nbits=bits, group_size=32, axis=1, bitpack=False, device="cpu")
            key = f"{name}/{bits}"
            found[f"{key}/codes"] = codes.numpy().astype(np.uint8)
            found[f"{key}/scale"], found[f"{key}/zero"] = meta["scale"].numpy(), meta["zero"].numpy()
            found[f"{key}/errors"] = np.array(errors(w, bits), np.float32)
    np.savez_compressed(Path(__file__).parent / "hqq.npz", **found)


def errors(w, bits):
    """The mean absolute error of each of hqq's 20 steps, without its early stop."""
    lo, hi = w.min(1, keepdim=True)[0], w.max(1, keepdim=True)[0]
    scale = (2**bits - 1) / (hi - lo)
    zero = -lo * scale
    out = []
    for _ in range(20):
        rounded, _, zero, scale = optimize_weights_proximal_legacy_step(w, scale, zero, [0, 2**bits - 1], 10.0, 0.7, 1)
        out.append(float((w - rounded).abs().mean()))
    return out


if __name__ == "__main__":
    main()
