"""Seconds to quantize the shipped model beside the torch reference of each method: one process, in turns. See README.md."""

import argparse
import contextlib
import copy
import dataclasses
import importlib.metadata
import io
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.evaluation import batches, calibration_windows, encode, perplexity, windows
from qjax.models import Llama, books_llama, books_llama_folder, calibration_lines, heldout_text

sys.path.append(str(pathlib.Path(__file__).parents[1] / "gptq_model"))
from peer import CompileClock, Peer

PACKAGES = ("jax", "torch", "torchao", "hqq", "bitsandbytes", "auto-round", "gptqmodel", "transformers")
QUALITY = ("error of the weights, both", "perplexity, both")
UNITS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What both sides start from.

    Attributes:
      samples: calibration windows.
      steps: of the methods that descend.
      tokens: (samples, 256) int32.
      apply: the model as a function.
      params: its parameters.
      torch_model: the same model in torch, never changed.
      text: held-out windows.
    """

    samples: int
    steps: int
    tokens: np.ndarray
    apply: Any
    params: Any
    torch_model: Any
    text: np.ndarray


@dataclasses.dataclass(frozen=True)
class Done:
    """One run: its seconds, and the weights that it gives by their names, (out, in); None where it does not hand them out."""

    seconds: float
    weights: dict[str, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """One method on both sides.

    Attributes:
      what: the method and its settings.
      reference: the package.
      ours: of the setup, the rule's weight and method; None as the second if it rounds.
      theirs: runs the reference once.
      decode: whether the time holds the way back to floats too, on both sides.
      data: whether calibration data is given.
    """

    what: str
    reference: str
    ours: Callable[[Setup], tuple[Any, Any]]
    theirs: Callable[[Setup], Done]
    decode: bool = False
    data: bool = False


def setup(samples, steps, count):
    """Loads the shipped model for both sides."""
    from transformers import LlamaForCausalLM

    checkpoint = books_llama()
    tokens = calibration_windows(checkpoint.tokenizer, calibration_lines(), count=samples)
    text = windows(encode(checkpoint.tokenizer, heldout_text()))[:count]
    model = LlamaForCausalLM.from_pretrained(str(books_llama_folder()), dtype="float32").eval()
    return Setup(samples, steps, tokens, Llama(checkpoint.config).apply, {"params": checkpoint.params}, model, text)


@jax.jit
def decoded(packed):
    """All packed weights as floats."""
    return [q.dequantize() for q in packed]


def run_ours(pair, made):
    """Quantizes every linear layer but the tied head, with a new function, so that no trace is remembered."""
    weight, method = pair.ours(made)
    policy = qjax.Policy([qjax.Rule("*embed*", weight=None), qjax.Rule("*", weight=weight, method=method)])
    data = [jnp.asarray(b) for b in batches(made.tokens if pair.data else made.tokens[:1], 8)]
    start = time.perf_counter()
    result = qjax.quantize(lambda *a: made.apply(*a), made.params, policy, calibration=data)
    packed = {path: q for path, q in leaves(result.params).items() if isinstance(q, qjax.QTensor)}
    jax.block_until_ready(decoded(list(packed.values())) if pair.decode else list(packed.values()))
    seconds = time.perf_counter() - start
    return Done(seconds, {path: np.asarray(q.dequantize()).T for path, q in packed.items()})


def leaves(params):
    """Leaves by their torch names."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, qjax.QTensor))
    return {torch_name(path): leaf for path, leaf in flat}


def torch_name(path):
    """Name in torch of the layer that holds a leaf."""
    return ".".join(k.key for k in path[1:-1]).replace("layers_", "layers.")


def linears(model):
    """The same layers in torch, by the same names."""
    return {name.removeprefix("model."): m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in UNITS}


def torchao(config):
    """Rounding by torchao."""

    def run(made):
        from torchao.quantization import quantize_

        model = copy.deepcopy(made.torch_model)
        start = time.perf_counter()
        quantize_(model, config(), filter_fn=lambda module, name: name.rsplit(".", 1)[-1] in UNITS)
        seconds = time.perf_counter() - start
        return Done(seconds, {name: m.weight.dequantize().detach().numpy() for name, m in linears(model).items()})

    return run


def int8_config():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def int4_config():
    import torch
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128))


def hqq(made):
    """The solver of hqq on each weight, packed as it packs them."""
    from hqq.core.quantize import Quantizer

    layers = linears(made.torch_model)
    start = time.perf_counter()
    packed = {name: Quantizer.quantize(m.weight.data, nbits=4, group_size=64, axis=1, device="cpu") for name, m in layers.items()}
    seconds = time.perf_counter() - start
    weights = {}
    for name, (codes, meta) in packed.items():
        weights[name] = Quantizer.dequantize(codes, meta | {"compute_dtype": layers[name].weight.dtype}).numpy()
    return Done(seconds, weights)


def nf4(made):
    """bitsandbytes' NF4 and back."""
    from bitsandbytes import functional

    layers = linears(made.torch_model)
    start = time.perf_counter()
    packed = {name: functional.quantize_4bit(m.weight.data, blocksize=64, quant_type="nf4") for name, m in layers.items()}
    weights = {name: functional.dequantize_4bit(*pair) for name, pair in packed.items()}
    return Done(time.perf_counter() - start, {name: w.numpy() for name, w in weights.items()})


def autoround(made):
    """auto-round's own loop over the blocks, in float32 on both sides."""
    import torch
    from auto_round import AutoRound

    model = copy.deepcopy(made.torch_model)
    rows = torch.tensor(made.tokens, dtype=torch.long)
    start = time.perf_counter()
    quantizer = AutoRound(
        model, tokenizer(), bits=4, group_size=128, sym=True, iters=made.steps, nsamples=made.samples, batch_size=8, amp=False,
        seqlen=made.tokens.shape[1], dataset=list(rows.split(8)), device_map="cpu", enable_torch_compile=False, low_cpu_mem_usage=False,
    )  # fmt: skip
    tuned, _ = quantizer.quantize()
    seconds = time.perf_counter() - start
    return Done(seconds, {name: m.weight.detach().float().numpy() for name, m in linears(tuned).items()})


def tokenizer():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(books_llama_folder() / "tokenizer.json"))


def gptqmodel(made):
    """gptqmodel's hooks and solver, and two forward passes."""
    return Done(Peer(made.tokens).run(4)["total"])


def gptq_of(_):
    return qjax.int4(group_size=128), qjax.gptq(mse=False)


def autoround_of(made):
    return qjax.int4(group_size=128), qjax.autoround(steps=made.steps, mse=False)  # from the extreme values, as the reference does


PAIRS = {
    "int8": Pair("rounding, 8 bit per channel", "torchao", lambda _: (qjax.int8(), None), torchao(int8_config)),
    "int4": Pair("rounding, 4 bit g128", "torchao", lambda _: (qjax.int4(group_size=128), None), torchao(int4_config)),
    "nf4": Pair("NF4 g64, there and back", "bitsandbytes", lambda _: (qjax.nf4(group_size=64), None), nf4, decode=True),
    "hqq": Pair("HQQ, 4 bit g64", "hqq", lambda _: (qjax.uint4(group_size=64, zero_dtype="float16"), qjax.hqq()), hqq),
    "gptq": Pair("GPTQ, 4 bit g128, ranges of the paper", "gptqmodel", gptq_of, gptqmodel, data=True),
    "autoround": Pair("AutoRound, 4 bit g128", "auto-round", autoround_of, autoround, data=True),
}


def compare(pair, made, repeats, clock):
    """Runs both sides in turns, each once before it counts; returns the row's figures."""
    clock.read()
    ours = run_ours(pair, made)
    first, times = clock.read(), {"ours": [], "theirs": []}
    started = time.perf_counter()
    theirs = quietly(pair.theirs, made)
    theirs_first = time.perf_counter() - started
    for _ in range(repeats):
        seconds = run_ours(pair, made).seconds
        times["ours"].append(seconds - clock.read())
        times["theirs"].append(quietly(pair.theirs, made).seconds)
    return {
        "ours": statistics.median(times["ours"]),
        "compile": first,
        "theirs": statistics.median(times["theirs"]),
        "theirs_first": theirs_first,
        "quality": [quality(done.weights, made) for done in (ours, theirs)],
    }


def quietly(run, made):
    """Runs a reference without the progress it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run(made)


def quality(weights, made):
    """(mean over layers of |w - w_hat|^2 / |w|^2, perplexity) with these weights, whoever made them; None without any."""
    if weights is None:
        return None
    exact = {name: m.weight.detach().numpy() for name, m in linears(made.torch_model).items()}
    if sorted(exact) != sorted(weights):
        raise ValueError(f"`weights` are of other layers than the model's: {sorted(set(exact) ^ set(weights))}")
    error = np.mean([np.sum((w - weights[name]) ** 2) / np.sum(w**2) for name, w in exact.items()])
    put = {name: jnp.asarray(w.T) for name, w in weights.items()}
    params = jax.tree_util.tree_map_with_path(lambda path, w: put.get(torch_name(path), w), made.params)
    return float(error), perplexity(made.apply, params, made.text)


def show(pair, row):
    """One row of the table."""
    ours, theirs = row["ours"], row["theirs"]
    cells = (pair.what, f"{ours:.3f}", f"{row['compile']:.1f}", pair.reference, f"{theirs:.3f}", f"{row['theirs_first']:.1f}")
    errors, scores = (
        " / ".join("-" if q is None else form.format(q[i]) for q in row["quality"]) for i, form in enumerate(("{:.5f}", "{:.3f}"))
    )
    return f"| {' | '.join(cells)} | {ours / theirs:.2f} | {errors} | {scores} |"


def machine():
    """What it ran on."""
    import torch

    versions = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    info = pathlib.Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    cpu = f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    return f"Python {platform.python_version()}, {', '.join(versions)}; {cpu}, load {os.getloadavg()[0]:.1f} at the start"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="*", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--repeats", type=int, default=5, help="turns that count")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows of 256 tokens")
    parser.add_argument("--steps", type=int, default=200, help="of AutoRound, on each block")
    parser.add_argument("--windows", type=int, default=32, help="held-out windows of the perplexities")
    options = parser.parse_args()
    made, clock, on = setup(options.samples, options.steps, options.windows), CompileClock(), machine()
    print(f"{on}. Medians of {options.repeats} turns; {options.samples} windows, {options.steps} steps; perplexity of {len(made.text)}.\n")
    columns = ("method", "qjax, s", "compiling, s", "reference", "s", "its first run, s", "qjax / reference", *QUALITY)
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in options.methods:
        print(show(PAIRS[name], compare(PAIRS[name], made, options.repeats, clock)), flush=True)


if __name__ == "__main__":
    main()
