"""Makes `gptaq.npz`: GPTAQ of one small layer by gptqmodel (torch). Run by hand with `pip install gptqmodel`; the tests read the file.

The layer and both inputs come from NumPy's generator (`layer`), so that only answers are stored: unsigned codes with columns in their
original order, scales and the group of each column.
"""

import pathlib

import numpy as np

N, K, ROWS, GROUP = 48, 128, 512, 32
# group size, alpha, act-order, static groups
CASES = {
    "channel": (-1, 0.25, False, False),
    "channel_whole": (-1, 1.0, False, False),
    "static_actorder": (GROUP, 0.25, True, True),
    "groups": (GROUP, 0.25, False, False),
    "groups_actorder": (GROUP, 0.25, True, False),
}


def layer():
    """A weight (N, K), the inputs behind quantized layers (ROWS, K) and those of the float model."""
    rng = np.random.default_rng(7)
    mixing = rng.standard_normal((K, K)) * np.exp(rng.standard_normal(K) * 0.5)
    floats = rng.standard_normal((ROWS, K)) @ mixing / K**0.5
    quantized = 0.97 * floats + 0.15 * rng.standard_normal((ROWS, K)) @ mixing / K**0.5
    return tuple(np.float32(x) for x in (rng.standard_normal((N, K)), quantized, floats))


def main():
    import torch
    from gptqmodel.looper.named_module import NamedModule
    from gptqmodel.looper.native_processor import NATIVE_INPUTS_STATE_KEY
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig
    from gptqmodel.quantization.gptaq import GPTAQ

    w, quantized, floats = (torch.tensor(x) for x in layer())
    out = {}
    for name, (group, alpha, act_order, static) in CASES.items():
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.data = w.clone()
        module = NamedModule(linear, name="layer", full_name="layer", layer_index=0)
        module.state[NATIVE_INPUTS_STATE_KEY] = [floats[None]]
        config = QuantizeConfig(bits=3, group_size=group, desc_act=act_order, static_groups=static, damp_percent=0.01,
                                gptaq=GPTAQConfig(alpha=alpha), act_group_aware=False)  # fmt: skip
        task = GPTAQ(module, config)
        task.quantizer.configure(perchannel=True)
        task.add_batch(quantized[None], quantized[None] @ w.T)
        # Blocks of a group: there a group's scale comes from weights that have every update from before it.
        q, scale, zero, group, *_ = task.quantize(blocksize=K if group == -1 or static else group)
        codes = np.round(q.float().numpy() / scale.numpy()[:, group.numpy()] + zero.numpy()[:, group.numpy()])
        out |= {f"{name}_codes": np.uint8(codes), f"{name}_scale": np.float32(scale), f"{name}_g_idx": np.uint8(group)}
    np.savez_compressed(pathlib.Path(__file__).parent / "gptaq.npz", **out)


if __name__ == "__main__":
    main()
