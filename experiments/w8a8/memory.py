"""What calibration holds in memory, against the number of batches. See README.md."""

import jax
import jax.numpy as jnp

import qjax
from qjax.evaluation import batches, calibration_windows
from qjax.models import Llama, books_llama, calibration_lines

INT8 = qjax.int8()
RECIPES = {
    "static entropy ranges": {"weight": INT8, "activation": qjax.static(INT8, qjax.entropy())},
    "smoothquant, searched": {"weight": INT8, "activation": qjax.static(INT8), "method": qjax.smoothquant("search")},
    "gptq": {"weight": qjax.int4(group_size=128), "method": qjax.gptq()},
    "gptq, 8 MB of live values": {"weight": qjax.int4(group_size=128), "method": qjax.gptq()},
}


def held():
    """Bytes of all arrays that are alive."""
    return sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())


def main():
    checkpoint = books_llama()
    apply, params = Llama(checkpoint.config).apply, {"params": checkpoint.params}
    rows = calibration_windows(checkpoint.tokenizer, calibration_lines())
    print("| | 2 batches | 4 batches | 8 batches | live values counted, 8 batches | of these on disk |\n|---|---|---|---|---|---|")
    for name, how in RECIPES.items():
        peaks, memory = [], {}
        for count in (2, 4, 8):
            data = [jnp.asarray(b) for b in batches(rows[: 8 * count], 8)]
            policy = qjax.Policy([qjax.Rule("*embed*", weight=None), qjax.Rule("*", **how)])
            before, seen = held(), []
            spill = qjax.Spill(8 * 10**6) if "live" in name else None
            result = qjax.quantize(apply, params, policy, data, progress=lambda _, seen=seen: seen.append(held()), spill=spill)
            peaks.append((max(seen) - before) / 1e6)
            memory = result.report.memory
            del result
        cells = " | ".join(f"{peak:.1f} MB" for peak in peaks)
        live = f"{memory['live'] / 1e6:.1f} MB | {memory['spilled'] / 1e6:.1f} MB" if memory else "none |"
        print(f"| {name} | {cells} | {live} |", flush=True)


if __name__ == "__main__":
    main()
