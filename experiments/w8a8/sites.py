"""The error of every site's output under AWQ, GPTQ and rounding, weights only. See README.md."""

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.calibration import SecondMoment, init_states, observe_program
from qjax.core import QTensor
from qjax.policy import Policy
from qjax.program import trace
from qjax.ptq import as_batches
from qjax.ptq.parts import matrices, problem_of
from qjax.ptq.progress import Monitor
from qjax.ptq.rescale import rescale
from qjax.ptq.resume import Kept


def site_errors(apply, params, policy: Policy, calibration, text):
    """For each quantized parameter |x w' - x w|^2 / |x w|^2 on float activations of `text`; x and w' as the method rescaled them."""
    result = qjax.quantize(apply, params, policy, calibration)
    program = trace(apply, params, text)
    choices = policy.resolve(program)
    streams = [(trace(apply, params, *batch), jax.tree.leaves(batch)) for batch in as_batches(calibration)]
    rescaled = rescale(jax.tree.leaves(params), choices, streams, Monitor(), Kept()).params
    observers = {site.key: SecondMoment() for site in program.sites if site.op == "dot_general"}
    run = jax.jit(observe_program(program, observers))
    states = run(init_states(program, observers), [*rescaled, text])
    packed = jax.tree.leaves(result.params, is_leaf=lambda x: isinstance(x, QTensor))
    out = {}
    for choice in choices:
        if choice.spec is None:
            continue
        (site,), w = choice.leaf.sites, jnp.asarray(rescaled[choice.leaf.index])
        moment = states[site.key].total
        change, whole = (
            float(jnp.einsum("snk,skj,snj->", m, moment, m, precision="highest"))
            for m in (matrices(problem_of(choice.leaf, site, choice.spec, v)) for v in (packed[choice.leaf.index].dequantize() - w, w))
        )
        out[choice.leaf.path] = change / whole
    return out


def compare(apply, params, keep, recipes, calibration, text):
    """Prints, for each recipe beside rounding with the same spec, how many sites are better and by how much."""
    print("\n### error of every site's output, float activations of held-out text\n")
    print("| | sites | mean error | error / rounding's: mean | least | largest |\n|---|---|---|---|---|---|", flush=True)
    errors = {}
    for name, (weight, _, method) in recipes.items():
        mine = errors[name] = site_errors(apply, params, Policy([keep, qjax.Rule("*", weight=weight, method=method)]), calibration, text)
        base = errors[f"{name.rsplit(' ', 1)[0]} rtn"]
        ratio = np.array([mine[path] / base[path] for path in mine])
        mean = np.mean(list(mine.values()))
        print(f"| {name} | {len(mine)} | {mean:.5f} | {ratio.mean():.3f} | {ratio.min():.3f} | {ratio.max():.3f} |", flush=True)
    return errors
