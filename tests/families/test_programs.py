"""What really runs in every family: integers at each quantized site, no float product for it, no float copy of its weight."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import qjax
from qjax.graph import Fold, find_folds
from qjax.program import compat, shared_inputs
from tests.families import nnx_models
from tests.families.families import NAMES, family
from tests.families.linen_models import ExpertModel, made
from tests.families.shared import HIDDEN, LAYERS, VOCAB, WIDTH
from tests.families.test_methods import quantized_family
from tests.test_modules import is_q

INT8 = qjax.int8()
W8A8 = {"weight": INT8, "activation": qjax.dynamic(INT8)}
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
INTEGER = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.*xi8>, tensor<[0-9x]*xi8>\) -> tensor<[0-9x]*xi32>")
FLOAT = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.*x(?:f32|bf16)>\) -> ")
ORDINARY = ("decoder, linen", "encoder bf16, nnx", "residual, linen", "experts sorted, nnx", "experts dispatched, linen", "scanned, nnx")
every_family = pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ORDINARY else pytest.mark.slow) for n in NAMES])


def products(jaxpr):
    """How many products a program holds; a loop's body counts once, as it does in StableHLO."""
    body, _ = compat.parts(jaxpr)
    inner = [products(sub) for eqn in body.eqns for _, sub in compat.subprograms(eqn)]
    return sum(eqn.primitive.name in PRODUCTS for eqn in body.eqns) + sum(inner)


def lowered(model, result):
    return jax.jit(qjax.quantized(model.fn)).lower(result.params, *model.data[0])


def operations(text):
    """The lines of a StableHLO module, those of a function as often as it is called."""
    bodies = {m[1]: m[2] for m in re.finditer(r"func\.func (?:public |private )?@(\S+?)\((.*?)\n  }\n", text, re.DOTALL)}

    def lines(name):
        for line in bodies[name].splitlines():
            called = re.search(r"\bcall @(\S+?)\(", line)
            yield from lines(called[1]) if called else [line]

    return list(lines("main"))


@every_family
def test_every_quantized_site_multiplies_integers_and_no_other_float_product_is_left(name):
    model, result = quantized_family(name, W8A8)
    program = qjax.trace(model.fn, model.params, *model.data[0])
    sites = [site for site in program.sites if site.op != "gather"]
    assert {s.path for s in program.sites} == {row.path for row in result.report.rows if row.spec}
    lines = operations(lowered(model, result).as_text())
    assert sum(bool(INTEGER.search(line)) for line in lines) == len(sites)
    # What is left are the products of two activations: attention's, and the dispatch to experts.
    assert sum(bool(FLOAT.search(line)) for line in lines) == products(program.jaxpr) - len(sites)
    # No table or weight becomes float anywhere: a lookup reads its rows only. Sizes are such that a shape tells what it is.
    assert not float_copies(program, result.params, "\n".join(lines))


@pytest.mark.parametrize("name", ["encoder, linen", pytest.param("scanned, nnx", marks=pytest.mark.slow)])
def test_static_asymmetric_activations_multiply_integers_too(name):
    model, result = quantized_family(name, {"weight": INT8, "activation": qjax.static(qjax.uint8())})
    program = qjax.trace(model.fn, model.params, *model.data[0])
    sites = [site for site in program.sites if site.op != "gather"]
    lines = operations(lowered(model, result).as_text())
    assert sum(bool(INTEGER.search(line)) for line in lines) == len(sites)
    assert sum(bool(FLOAT.search(line)) for line in lines) == products(program.jaxpr) - len(sites)
    assert not float_copies(program, result.params, "\n".join(lines))


@pytest.mark.parametrize("name", ["scanned, nnx", pytest.param("encoder, linen", marks=pytest.mark.slow)])
def test_outlier_columns_are_one_product_of_capacity_a_site(name):
    """Beside the integers, and nothing else is float for them."""
    model, result = quantized_family(name, {"weight": INT8, "method": qjax.llm_int8(threshold=1.0, capacity=8)})
    program = qjax.trace(model.fn, model.params, *model.data[0])
    sites = [site for site in program.sites if site.op != "gather"]
    lines = operations(lowered(model, result).as_text())
    floats = [line for line in lines if FLOAT.search(line)]
    mixed = [line for line in floats if all(8 in dims for dims in operand_dims(line))]
    assert sum(bool(INTEGER.search(line)) for line in lines) == len(mixed) == len(sites)
    assert len(floats) - len(mixed) == products(program.jaxpr) - len(sites)
    assert not float_copies(program, result.params, "\n".join(lines))


def operand_dims(line):
    return [[int(n) for n in dims.split("x")] for dims in re.findall(r"tensor<([0-9x]+)x\w+>", line.split(" : ")[-1].split("->")[0])]


def float_copies(program, params, text):
    """The float arrays in StableHLO or HLO with the sizes of a weight, or of one layer or expert of it, in any order or flattened.

    A weight with the sizes of another's scales (a router's those of its experts) cannot be told from them and is left out.
    """
    packed = [q for q in jax.tree.leaves(params, is_leaf=is_q) if is_q(q)]
    scales = {tuple(sorted(n for n in q.scale.shape if n > 1)) for q in packed}
    found = re.findall(r"tensor<((?:\d+x)+)(?:f32|bf16|f64)>", text) + re.findall(r"\b(?:f32|bf16|f64)\[([\d,]+)\]", text)
    held = {tuple(sorted(int(n) for n in re.findall(r"\d+", shape) if int(n) > 1)) for shape in found}
    out = []
    for site in program.sites:
        shape = program.leaves[site.leaf].shape
        part = [n for axis, n in enumerate(shape) if axis not in site.stacked]
        contracted = math.prod(shape[a] for a in site.contracted)
        matrix = [contracted, math.prod(part) // contracted]
        looks = {tuple(sorted(n for n in sizes if n > 1)) for sizes in (shape, part, matrix, [matrix[0] * matrix[1]])}
        out += [(site.path, look) for look in (looks & held) - scales if math.prod(look) > 50]
    return out


def test_the_search_for_float_copies_finds_them():
    model, result = quantized_family("scanned, linen", {"weight": INT8})
    program = qjax.trace(model.fn, model.params, *model.data[0])
    found = float_copies(program, result.params, lowered(model, result).as_text())
    assert {path for path, _ in found} == {row.path for row in result.report.rows if row.spec}


def integer_products(text):
    """The (operation, operand dtypes, result sizes) of all products with an integer result in compiled HLO."""
    found, types = [], {}
    for line in text.splitlines():
        if line.endswith("{"):
            types = {}
        made = re.match(r"\s*(?:ROOT )?%?(\S+) = (\w+)\[([\d,]*)\]\S* (\w[\w-]*)\(([^)]*)\)", line)
        if made is None:
            continue
        name, dtype, sizes, operation, operands = made.groups()
        types[name] = dtype
        if operation in ("dot", "convolution") and dtype == "s32":
            inputs = {types.get(operand.strip().split(" ")[-1].lstrip("%")) for operand in operands.split(",")}
            found.append((operation, inputs, math.prod(map(int, sizes.split(",")))))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if "bf16" not in n])
def test_the_compiled_program_keeps_integers_and_no_float_weight(name):
    model, result = quantized_family(name, W8A8)
    program = qjax.trace(model.fn, model.params, *model.data[0])
    text = lowered(model, result).compile().as_text()
    # XLA's CPU has no convolution of int8 operands and widens them to int32, also those of a plain int8 program: still integers.
    kinds = {"dot_general": ("dot", [{"s8"}]), "conv_general_dilated": ("convolution", [{"s8"}, {"s32"}, {"s8", "s32"}])}
    for op, (operation, operands) in kinds.items():
        # A loop of experts' blocks has products beside those of the sites, so there may be more.
        sizes = collections.Counter(math.prod(site.out_shape) for site in program.sites if site.op == op)
        found = collections.Counter(n for made, inputs, n in integer_products(text) if made == operation and inputs in operands)
        assert sizes <= found, (sizes, found)
    assert not re.search(r"= (?:f32|bf16)\S* convolution", text)
    assert not float_copies(program, result.params, text)


@pytest.mark.parametrize("kind", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
def test_the_arithmetic_of_experts_does_not_grow_with_their_number(kind):
    """640 rows over 4 or 16 experts: an expert adds at most one block of 16 rows; a masked product would take 4 times as much."""
    work = {}
    text = jnp.arange(320, dtype=jnp.int32).reshape(8, 40) % VOCAB
    for count in (4, 16):
        if kind == "linen":
            fn, params = made(ExpertModel(True, count), text)
        else:
            fn, params = nnx_models.made(nnx_models.ExpertModel(nnx.Rngs(0), True, count))
        result = qjax.quantize(fn, params, qjax.Policy([qjax.Rule("*", **W8A8)]), calibration=[text])
        work[count] = expert_work(jax.make_jaxpr(qjax.quantized(fn))(result.params, text))
    rows = 2 * text.size
    assert work[4] == 3 * (rows // 16 + 4) * 16 * WIDTH * HIDDEN
    assert work[16] == 3 * (rows // 16 + 16) * 16 * WIDTH * HIDDEN < 1.3 * work[4]


def expert_work(jaxpr, times=0):
    """Multiplications of integers inside loops, as often as the loops turn."""
    body, _ = compat.parts(jaxpr)
    total = 0
    for eqn in body.eqns:
        turns = (times or 1) * eqn.params["length"] if eqn.primitive.name == "scan" else times
        total += sum(expert_work(inner, turns) for _, inner in compat.subprograms(eqn))
        if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.dtype == jnp.int32:
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[a] for a in contracted)
            total += times * depth * math.prod(eqn.outvars[0].aval.shape)
    return total


def test_a_module_that_hands_its_state_back_keeps_it_packed():
    """`nnx.remat` and `nnx.scan` return the parameters of the layers that they ran: no other use of them, and no float stack."""
    model = family("scanned, nnx")
    program = qjax.trace(model.fn, model.params, *model.data[0])
    assert all(not leaf.consumers for leaf in program.leaves if leaf.sites)
    grouped = [[site.path.split("/")[1] for site in group] for group in shared_inputs(program)]
    assert ["q", "k", "v"] in grouped and ["gate", "up"] in grouped
    folds = {" ".join(site.path for site in group): fold for group, fold in find_folds(program)}
    fold = folds["layers/down/kernel"]
    assert isinstance(fold, Fold) and fold.shape == (LAYERS, HIDDEN)
