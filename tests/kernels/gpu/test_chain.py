"""The Hopper kernel of products that follow one another, thread by thread in NumPy, against float64."""

import jax
import jax.extend
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from qjax_kernels.gpu.chain import TILES, chain, counters, interleaved, one_by_one
from qjax_kernels.gpu.chain_shape import Link, shapes_of, shared_bytes
from qjax_kernels.gpu.order import by_threads
from qjax_kernels.gpu.tiles import Direct, Tiles

pytest.importorskip("absl")

from qjax_kernels.gpu.chain_kernel import follow

from tests.kernels.gpu.simulator import launch
from tests.kernels.gpu.test_direct import drawn, exact, nibbles

BF16 = ml_dtypes.bfloat16
TAIL = (Link(0, added=1), Link(2, norm=1e-5, gated=True), Link(3, added=2), Link(4, norm=1e-5))  # of a layer: out, gate and up, down, qkv


def tail(m, width, hidden, group, bits):
    """Two values that come in, and the weights of TAIL."""
    shapes = [(width, width), (2 * hidden, width), (width, hidden), (width + 64, width)]
    made = [drawn(m, n, k, group, BF16, b) for (n, k), b in zip(shapes, bits, strict=True)]
    residual = np.random.default_rng(3).normal(size=(m, width)).astype(BF16)
    scaled = [(codes, (scales.astype(np.float32) / codes.shape[1] ** 0.5 / 4).astype(BF16)) for _, codes, scales in made]
    return [made[0][0], residual], scaled


def ran(inputs, weights, links, group, bits, tiles, cores):
    """Results of the blocks, and the counters behind them; what nobody writes stays NaN."""
    shapes = shapes_of([x.shape for x in inputs], [c.shape for c, _ in weights], links, [s.shape[1] for _, s in weights],
                       [s.dtype for _, s in weights], bits, group=group, tiles=tiles, cores=cores)  # fmt: skip
    packed = [c.astype(np.int8) if b == 8 else nibbles(c) for (c, _), b in zip(weights, bits, strict=True)]
    met = np.zeros(len(links), np.int32)
    results = [np.full((s.m, s.out), np.nan, BF16) for s in shapes]
    rest = [part for codes, (_, scales) in zip(packed, weights, strict=True) for part in (codes, scales)]
    machines = launch(lambda w, start, *given: follow(w, shapes, links, start, given[: len(inputs)], given[len(inputs) :]),
                      shapes[0].blocks, 32 * tiles.warps, [*inputs, *rest, met, *results], shared_bytes(shapes))  # fmt: skip
    return results, met, machines


def expected(link, values, codes, scales, group):
    """A product in float64 of the values as they came in, and how far rounding may take it."""
    x = values[link.x]
    y, magnitude = exact(x, codes, scales, group)
    if link.norm is not None:
        root = np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + link.norm)
        y, magnitude = y / root, magnitude / root
    near = 2**-14 * magnitude
    if link.gated:
        gate, other = (y.reshape(len(y), -1, 2, 8)[:, :, i].reshape(len(y), -1) for i in (0, 1))
        near = near.reshape(len(y), -1, 2, 8)
        near = near[:, :, 0] * (1 + np.abs(other.reshape(len(y), -1, 8))) + near[:, :, 1] * (1 + np.abs(gate.reshape(len(y), -1, 8)))
        near, y = near.reshape(len(y), -1), gate / (1 + np.exp(-gate)) * other
    if link.added is not None:
        y = y + values[link.added].astype(np.float64)
    return y, near + 2**-8 * np.abs(y)


@pytest.mark.parametrize(
    ("m", "bits", "group", "tiles", "cores"),
    [
        (1, (4, 4, 4, 4), 128, Direct(4, 2, 1), 3),
        (3, (4, 8, 4, 8), 128, Direct(8, 1, 2), 2),
        (8, (8, 4, 8, 4), 128, Direct(4, 4, 1), 2),
        (5, (4, 4, 4, 4), 256, Direct(16, 2, 1), 26),  # more blocks than a product has tiles
    ],
)
def test_each_product_is_that_of_the_results_before_it(m, bits, group, tiles, cores):
    inputs, weights = tail(m, 256, 768, group, bits)
    results, met, machines = ran(inputs, weights, TAIL, group, bits, tiles, cores)
    values = [*inputs, *results]
    for i, (link, (codes, scales)) in enumerate(zip(TAIL, weights, strict=True)):
        y, near = expected(link, values, codes, scales, group)
        assert np.all(np.abs(results[i].astype(np.float64) - y) <= near), i
    assert not met.any(), "the counters of the next launch"
    assert len(machines) > 1


def test_in_jax_one_by_one_it_reads_the_same():
    bits = (4, 8, 4, 4)
    inputs, weights = tail(2, 256, 512, 128, bits)
    results, _, _ = ran(inputs, weights, TAIL, 128, bits, Direct(4, 2, 1), 2)
    placed = [jnp.asarray(by_threads(c), jnp.int4) if b == 4 else jnp.asarray(c, jnp.int8) for (c, _), b in zip(weights, bits, strict=True)]
    given = [(codes, jnp.asarray(scales)) for codes, (_, scales) in zip(placed, weights, strict=True)]
    plain = one_by_one([jnp.asarray(x) for x in inputs], given, links=TAIL, group_size=128)
    for ours, theirs in zip(results, plain, strict=True):
        assert np.linalg.norm(ours.astype(np.float32) - np.float32(theirs)) <= 0.01 * np.linalg.norm(np.float32(theirs))


def test_a_gate_and_its_other_half_are_told_apart():
    gate, other = jnp.arange(16.0)[:, None] - 8, 100 + jnp.arange(16.0)[:, None]
    both = interleaved(gate, other)
    np.testing.assert_array_equal(both[:8], gate[:8])
    np.testing.assert_array_equal(both[24:], other[8:])


def test_one_product_needs_nobody_to_meet():
    inputs, weights = tail(1, 256, 512, 128, (4,) * 4)
    results, met, _ = ran(inputs, weights[:1], TAIL[:1], 128, (4,), Direct(4, 2, 1), 2)
    y, near = expected(TAIL[0], inputs, *weights[0], 128)
    assert np.all(np.abs(results[0].astype(np.float64) - y) <= near) and not met.any()


def given(m=1, width=256):
    x, w = jnp.zeros((m, width), jnp.bfloat16), (jnp.zeros((width, width), jnp.int4), jnp.ones((width, width // 128), jnp.bfloat16))
    return [x], [w], counters(1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"links": [Link(1)]}, "`x` of product 0 is value 1; 1 come before"),
        ({"links": [Link(0, added=7)]}, "`added` of product 0"),
        ({"links": [Link(0, added=0, gated=True)]}, "256 wide; the product takes 128"),
        ({"group_size": 96}, "`group_size` is 96; it must be an int, a multiple of 128"),
        ({"group_size": 0}, "`group_size` is 0"),
        ({"group_size": -128}, "`group_size` is -128"),
        ({"group_size": None}, "`group_size` is None"),
        ({"cores": 1.5}, "`cores` is 1.5"),
        ({"group_size": 384}, "K of the group"),
        ({"cores": 0}, "`cores` is 0"),
        ({"tiles": Direct(split_k=2)}, "neither split K"),
        ({"tiles": Direct(early=True)}, "nor begin early"),
        ({"tiles": Direct(wide=True)}, "none is wide"),
        ({"tiles": Direct(16, 2, 2)}, "share 16 warps"),
    ],
)
def test_what_does_not_fit_together_is_named(change, named):
    inputs, weights, met = given()
    with pytest.raises(ValueError, match=named):
        chain(inputs, weights, met, **({"links": [Link(0)], "group_size": 128} | change))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"x": -1}, "`x` is -1"),
        ({"x": None}, "`x` is None"),
        ({"added": -2}, "`added` is -2"),
        ({"norm": -1.0}, "`norm` is -1.0"),
        ({"gated": "no"}, "`gated`"),
    ],
)
def test_links_that_say_nothing_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        Link(**({"x": 0} | fields))


def test_one_by_one_refuses_what_a_chain_does():
    (x,), weights, met = given()
    for change, kind, named in (
        ({"inputs": x}, TypeError, "`inputs` is a .*; it must be a list"),
        ({"inputs": [x, x[:, :1].repeat(2, 0)]}, ValueError, "must have the same number"),
        ({"inputs": [x.astype(jnp.float32)]}, ValueError, "rows of bfloat16"),
        ({"links": [Link(3)]}, ValueError, "`x` of product 0 is value 3"),
        ({"weights": [weights[0][0]]}, TypeError, r"weight 0 is a .*; it must be \(codes, scales\)"),
    ):
        how = {"inputs": [x], "weights": weights, "links": [Link(0)], "group_size": np.int64(128)} | change
        with pytest.raises(kind, match=named):
            one_by_one(**how)
        with pytest.raises(kind, match=named):
            chain(counters=met, **how)


def test_fewer_counters_than_products_are_refused():
    inputs, weights, met = given()
    with pytest.raises(ValueError, match=r"`counters` are \(1,\) int32; make them by counters\(2\)"):
        chain(inputs, weights * 2, met, links=[Link(0), Link(1)], group_size=128)


def test_tiles_of_a_pipeline_are_refused():
    inputs, weights, met = given()
    with pytest.raises(TypeError, match=r"`tiles` are Tiles\(.*take Direct"):
        chain(inputs, weights, met, links=[Link(0)], group_size=128, tiles=Tiles(8, 64, 128, 2))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("codes", "scales", "named"),
    [
        (((256, 256), jnp.int4), ((128, 2), jnp.bfloat16), r"scales of product 0 are \(128, 2\).*take \(256, 2\)"),
        (((256, 256), jnp.int4), ((256, 1), jnp.bfloat16), r"scales of product 0 are \(256, 1\).*take \(256, 2\)"),
        (((256, 256), jnp.int4), ((256,), jnp.bfloat16), r"scales of product 0 are \(256,\)"),
        (((256, 256), jnp.int4), ((256, 2), jnp.int8), "scales of product 0 are int8; they must be bfloat16"),
        (((256, 256), jnp.bfloat16), ((256, 2), jnp.bfloat16), "codes of product 0 are .*bfloat16; they must be"),
        (((1, 256, 256), jnp.int4), ((256, 2), jnp.bfloat16), r"codes of product 0 are \(1, 256, 256\)"),
        (None, None, "`links` are 1 and `weights` 0"),
    ],
)
def test_codes_and_scales_that_do_not_fit_together_are_named(codes, scales, named):
    """They would be read behind their end, or as numbers of another width, without a word."""
    inputs, _, met = given()
    weights = [] if codes is None else [(jnp.zeros(*codes), jnp.ones(*scales))]
    with pytest.raises(ValueError, match=named):
        chain(inputs, weights, met, links=[Link(0)], group_size=128)
    with pytest.raises(ValueError, match=named):
        one_by_one(inputs, weights, links=[Link(0)], group_size=128)


def test_columns_of_scales_behind_the_last_group_are_not_read():
    inputs, [(codes, scales)], met = given()
    wide = jnp.pad(scales, ((0, 0), (0, 6)))
    (y,) = jax.eval_shape(lambda s: chain(inputs, [(codes, s)], met, links=[Link(0)], group_size=128), wide)
    assert y.shape == (1, 256)


def test_a_batch_is_a_launch_after_the_other():
    """Side by side, blocks of one would meet those of another by the same counters, and read what is not yet written."""
    (x,), weights, met = given()

    def run(x):
        return chain([x], weights, met, links=[Link(0)], group_size=128)

    names = set(primitives(jax.make_jaxpr(jax.vmap(run))(jnp.stack([x, x, x])).jaxpr))
    assert "scan" in names and "scan" not in set(primitives(jax.make_jaxpr(run)(x).jaxpr))


def test_a_derivative_is_refused_by_name():
    (x,), weights, met = given()
    with pytest.raises(NotImplementedError, match="differentiate `one_by_one`"):
        jax.grad(lambda x: chain([x], weights, met, links=[Link(0)], group_size=128)[0].astype(jnp.float32).sum())(x)


def primitives(jaxpr):
    """Names of everything in a program and in the programs in it."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from primitives(inner)


def test_more_rows_than_the_kernel_takes_are_refused():
    inputs, weights, met = given(m=9)
    with pytest.raises(ValueError, match="9 rows; a launch takes 1 to 8: `one_by_one` takes more"):
        chain(inputs, weights, met, links=[Link(0)], group_size=128)


def test_rows_that_shared_memory_does_not_hold_are_refused():
    """Of the widest K of a 7B shape seven fit."""

    def shapes(m):
        return shapes_of([(m, 14336)], [(4096, 14336)], [Link(0, norm=1e-5)], [112], [BF16], [4], group=128, tiles=TILES, cores=132)

    assert shapes(7)[0].m == 7
    with pytest.raises(ValueError, match=r"for 8 rows .*take fewer rows"):
        shapes(8)


def test_halves_that_are_not_alike_are_refused():
    with pytest.raises(ValueError, match="must be alike"):
        interleaved(jnp.zeros((8, 2)), jnp.zeros((16, 2)))
    with pytest.raises(ValueError, match=r"int4 and `other` .* int8: they must be alike"):
        interleaved(jnp.zeros((8, 2), jnp.int4), jnp.zeros((8, 2), jnp.int8))
