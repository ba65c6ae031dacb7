"""Optimizers with states in 8 bits, and states in the host's memory."""

import functools
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qjax
from qjax.training import Blocks, Moment8, scale_by_adam8bit
from qjax.training.host_offload import check_memory

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "bitsandbytes_optim.npz")
KINDS = {"adam": qjax.adam8bit(1e-2, 0.9, 0.99, 1e-8, 0.1), "lion": qjax.lion8bit(1e-2, 0.9, 0.99, 0.1)}


@pytest.mark.parametrize("name", KINDS)
def test_three_steps_are_those_of_bitsandbytes(name):
    tx, p = KINDS[name], jnp.asarray(GOLDEN["start"])
    update, state = jax.jit(tx.update), tx.init(p)
    alive = np.ones(p.shape, bool)
    for i, g in enumerate(GOLDEN["gradients"].astype(np.float32)):
        updates, state = update(jnp.asarray(g), state, p)
        p = optax.apply_updates(p, updates)
        mu, wanted = state[0].mu, {key: GOLDEN[f"{name}/{i}/{key}"] for key in ("p", "state1", "absmax1")}
        np.testing.assert_array_equal(mu.codes, wanted["state1"])
        np.testing.assert_allclose(mu.absmax, wanted["absmax1"], rtol=3e-7)
        np.testing.assert_allclose(np.asarray(p)[alive], wanted["p"][alive], rtol=0, atol=2e-6)
        if name == "adam":
            nu, theirs = state[0].nu, GOLDEN[f"adam/{i}/state2"]
            # What bitsandbytes stores as zero is the smallest level here.
            np.testing.assert_array_equal(np.asarray(nu.codes)[alive], np.maximum(theirs, 1)[alive])
            np.testing.assert_allclose(nu.absmax, GOLDEN[f"adam/{i}/absmax2"], rtol=3e-7)
            alive &= theirs > 0
    if name == "adam":
        assert 0.3 < alive.mean() < 0.6
        # There, the weights whose second moment was lost move by m / eps.
        assert np.abs(GOLDEN["adam/2/p"]).max() > 1e5 and np.abs(p - GOLDEN["start"]).max() < 0.1


def tree():
    keys = jax.random.split(jax.random.key(0), 3)
    return {"stack": jax.random.normal(keys[0], (2, 16, 256), jnp.bfloat16), "odd": jax.random.normal(keys[1], (50, 83)),
            "norm": jnp.ones(16), "frozen": {"codes": jnp.zeros((64, 64), jnp.int8)}}  # fmt: skip


def by_hand(g, steps, b1=0.9, b2=0.999):
    """Adam in float64."""
    g, m, v = np.asarray(g, np.float64), 0.0, 0.0
    for t in range(1, steps + 1):
        m, v = b1 * m + (1 - b1) * g * t, b2 * v + (1 - b2) * (g * t) ** 2
        move = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
    return move


def test_it_stands_with_the_other_transformations_of_optax():
    params = tree()
    trains = {"stack": "adam", "odd": "adam", "norm": "lion", "frozen": {"codes": "fixed"}}
    adam = optax.inject_hyperparams(qjax.adam8bit)(learning_rate=optax.piecewise_constant_schedule(1e-2, {2: 0.1}))
    tx = optax.multi_transform({"adam": adam, "lion": optax.masked(qjax.lion8bit(1e-3), lambda tree: jax.tree.map(lambda _: True, tree)),
                                "fixed": optax.set_to_zero()}, trains)  # fmt: skip
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(1,))
    def step(grads, state, t):
        grads = jax.tree.map(lambda g: g * t.astype(g.dtype), grads)
        return tx.update(grads, state, params)

    for t in range(1, 4):
        old = state
        updates, state = step(params, state, jnp.int32(t))
        assert all(x.is_deleted() for x in jax.tree.leaves(old) if x.dtype == np.uint8)
        for name in ("stack", "odd"):
            g = np.asarray(params[name], np.float64)
            wanted = -(1e-2 if t < 3 else 1e-3) * by_hand(g, t)
            # Of such values the second moment is a hundredth of the largest and more, and its levels 7 % apart.
            large = np.abs(g) > 0.5
            np.testing.assert_allclose(np.float64(updates[name])[large], wanted[large], rtol=0.06)
    assert step._cache_size() == 1
    assert optax.apply_updates(params, updates)["stack"].dtype == jnp.bfloat16
    assert not updates["frozen"]["codes"].any() and np.all(np.abs(np.abs(updates["norm"]) - 1e-3) < 1e-9)
    inner = state.inner_states["adam"].inner_state.inner_state[0]
    assert inner.mu["odd"].absmax.shape == (17,) and inner.nu["stack"].absmax.shape == (2, 16, 1)
    assert inner.mu["stack"].codes.dtype == np.uint8


def test_a_state_has_two_bytes_a_parameter_and_small_ones_stay_float():
    params = {"w": jax.ShapeDtypeStruct((4, 1000, 512), jnp.bfloat16), "b": jax.ShapeDtypeStruct((512,), jnp.bfloat16)}
    state = jax.eval_shape(scale_by_adam8bit().init, params)
    size = lambda t: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(t))  # noqa: E731
    assert size(state) == 4 * 1000 * 512 * 2 + 4 * 1000 * 2 * 8 + 512 * 8 + 4
    assert size(jax.eval_shape(qjax.lion8bit(1e-3).init, params)) == 4 * 1000 * 512 + 4 * 1000 * 2 * 4 + 512 * 4 + 4 * 0
    assert state.mu["b"].dtype == jnp.float32


def test_parts_change_no_number_and_a_step_holds_no_float_state():
    w = jax.random.normal(jax.random.key(1), (4, 512, 512))
    moved = {}
    for name, at_once in (("parts", 2**15), ("whole", None)):
        tx = scale_by_adam8bit(blocks=Blocks(at_once=at_once))
        step = jax.jit(lambda g, s, tx=tx: tx.update(g, s), donate_argnums=(0, 1))
        state = tx.init(w)
        memory = step.lower(w, state).compile().memory_analysis()
        moved[name] = step(w + 0, state), memory.temp_size_in_bytes, memory.alias_size_in_bytes
        assert memory.alias_size_in_bytes >= w.nbytes + 2 * w.size + 8 * w.size // 256
    (updates, state), (others, other) = moved["parts"][0], moved["whole"][0]
    np.testing.assert_allclose(updates, others, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), state, other)
    # In floats the state would take 8 bytes a parameter.
    assert moved["parts"][1] < w.size < 8 * w.size <= moved["whole"][1] * 2


def test_seeds_under_vmap_are_each_alone():
    grads = jax.random.normal(jax.random.key(2), (2, 16, 512))
    tx = qjax.adam8bit(1e-3)
    run = lambda g: tx.update(g, tx.update(2 * g, tx.init(g))[1])  # noqa: E731
    both = jax.jit(jax.vmap(run))(grads)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), both, jax.jit(run)(grads[1]))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_state_lies_where_its_parameters_lie(kind):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    plain = {name: jax.random.normal(jax.random.key(3), shape) for name, shape in
             (("columns", (16, 512)), ("cut", (16, 256)), ("rows", (2, 64, 64)), ("odd", (90, 50)))}  # fmt: skip
    params = {"columns": place(plain["columns"], None, "x"), "cut": place(plain["cut"], None, "x"),
              "rows": place(plain["rows"], None, "x"), "odd": place(plain["odd"], "x")}  # fmt: skip
    tx = qjax.host_offload(qjax.adam8bit(1e-3, blocks=Blocks(at_once=2**11)), at_least=16)
    step = jax.jit(lambda g, s: tx.update(g, s))
    states = [tx.init(params)]
    states += [step(params, states[0])[1]]
    for state in states:
        mu = state[0].mu
        for name, p in params.items():
            assert mu[name].codes.sharding.is_equivalent_to(p.sharding.with_memory_kind("pinned_host"), p.ndim), (kind, name)
        shards = {name: m.absmax.sharding.shard_shape(m.absmax.shape) for name, m in mu.items()}
        assert shards.pop("odd") in {(18,), (9,)}  # left to the compiler after the first step: its shards cut blocks
        assert shards == {"columns": (16, 1), "cut": (16, 1), "rows": (2, 8)}
        assert mu["columns"].absmax.sharding.memory_kind == "pinned_host" and mu["cut"].absmax.sharding.is_fully_replicated
    one = qjax.adam8bit(1e-3)
    wanted = jax.jit(lambda g: one.update(g, one.init(g)))(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), step(params, states[0])[0], wanted[0])
    jax.tree.map(np.testing.assert_array_equal, states[1][0].nu["rows"].codes, wanted[1][0].nu["rows"].codes)


def test_a_state_on_the_host_is_updated_to_the_same_bits(tmp_path):
    params = {"w": jax.random.normal(jax.random.key(4), (16, 512)), "b": jnp.ones(8)}
    alone = optax.chain(optax.clip_by_global_norm(1.0), qjax.adam8bit(1e-3))
    tx = qjax.host_offload(alone)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=(1,))
    updates, state = step(params, tx.init(params), params)
    updates, state = step(updates, state, params)
    kinds = jax.tree.map(lambda a: a.sharding.memory_kind, state[1][0].mu)
    assert kinds == {"w": Moment8("pinned_host", "device"), "b": "device"} and updates["w"].sharding.memory_kind == "device"
    plain = jax.jit(lambda g, s, p: alone.update(g, s, p))
    first, other = plain(params, alone.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, (updates, state), plain(first, other, params))

    traced = jax.jit(lambda g, s, p: tx.update(g, s, p)).trace(params, state, params)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("annotate_device_placement") == 4 and 'mhlo.memory_kind = "pinned_host"' in text
    assert text.count('_xla_buffer_placement = "pinned_host"') == 2 and text.count('_xla_buffer_placement = "device"') == 2

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "state", tx.init(params))
    jax.tree.map(np.testing.assert_array_equal, back, state)
    assert back[1][0].nu["w"].codes.sharding.memory_kind == "pinned_host"


def test_refusals():
    tx, w = qjax.adam8bit(1e-3), jnp.ones((64, 64))
    with pytest.raises(TypeError, match=r"`params` leaf 'codes' is int8.*optax.masked"):
        tx.init({"codes": jnp.zeros(3, jnp.int8)})
    with pytest.raises(ValueError, match=r"`state` holds codes of shape \(64, 64\).*inside a shard_map"):
        tx.update(w[:32], tx.init(w))
    with pytest.raises(ValueError, match=r"which has \(32,\) blocks of 128"):
        qjax.adam8bit(1e-3, blocks=Blocks(128)).update(w, tx.init(w))
    with pytest.raises(TypeError, match=r"`blocks` must be qjax.training.Blocks"):
        qjax.lion8bit(1e-3, blocks=256)
    for make in (qjax.adam8bit, qjax.lion8bit):
        with pytest.raises(ValueError, match="`b1` must be a number of at least 0 and below 1, got 1"):  # zeros, divided by zero
            make(1e-3, b1=1.0)
        with pytest.raises(TypeError, match="`learning_rate` must be a finite number or a schedule"):
            make("1e-3")
        with pytest.raises(TypeError, match="`weight_decay` must be a finite number or a schedule"):
            make(1e-3, weight_decay="0.1")
        with pytest.raises(ValueError, match="`mask` says which parameters decay, and `weight_decay` is None"):
            make(1e-3, mask={"w": True})
    with pytest.raises(ValueError, match="`eps` must be a number of at least 0, got -1e-08"):
        qjax.adam8bit(1e-3, eps=-1e-8)
    assert tx.update({"t": 1.0 + jnp.zeros(())}, tx.init({"t": 1.0}))[0]["t"].item() == pytest.approx(-1e-3, rel=1e-4)  # a number of Python
    with pytest.raises(ValueError, match="`size` must be an int of at least 2, got 0"):
        Blocks(0)
    with pytest.raises(TypeError, match="`tx` must be an optax transformation"):
        qjax.host_offload("adam")
    with pytest.raises(ValueError, match="`at_least` must be an int of at least 0, got -1"):
        qjax.host_offload(tx, -1)
    device = SimpleNamespace(device_kind="Old", platform="old", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    with pytest.raises(ValueError, match=r"Old \(old\), whose memories are device, and none is pinned_host"):
        check_memory(device)


@pytest.mark.slow
def test_a_network_learns_digits_as_with_states_of_32_bits():
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (64, 128, 128, 10)
    params = [jax.random.normal(k, (a, b)) * np.sqrt(2 / a) for k, a, b in zip(keys, sizes, sizes[1:], strict=False)]

    def loss(params, x, y):
        h = jax.nn.relu(jax.nn.relu(x @ params[0]) @ params[1]) @ params[2]
        return optax.softmax_cross_entropy_with_integer_labels(h, y).mean()

    def train(tx):
        def step(carry, i):
            rows = (i * 128 + jnp.arange(128)) % 1400
            grads = jax.grad(loss)(carry[0], x[rows], y[rows])
            updates, state = tx.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(150))[0][0]

    held = x[1400:], y[1400:]
    both = {"adam": (optax.adam(2e-3), qjax.adam8bit(2e-3)), "lion": (optax.lion(1e-3, weight_decay=0.0), qjax.lion8bit(1e-3))}
    for name, pair in both.items():
        float32, in8 = (float(loss(jax.jit(train, static_argnums=0)(tx), *held)) for tx in pair)
        assert float32 < 0.7 and abs(in8 / float32 - 1) < 0.05, (name, float32, in8)


@pytest.mark.parametrize("name", KINDS)
def test_an_optimizer_of_nnx_keeps_eight_bits_and_steps_as_without_it(name):
    tx, x = KINDS[name], jax.random.normal(jax.random.key(0), (4, 64))
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    optimizer, params = nnx.Optimizer(model, tx, wrt=nnx.Param), nnx.to_pure_dict(nnx.state(model))
    state = tx.init(params)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model))

    @jax.jit
    def plain(params, state):
        grads = jax.grad(lambda p: jnp.mean((x @ p["kernel"] + p["bias"] - 1) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        step(model, optimizer)
        params, state = plain(params, state)
    moments = {field: getattr(optimizer.opt_state[0], field) for field in ("mu", "nu") if hasattr(optimizer.opt_state[0], field)}
    assert len(moments) == (2 if name == "adam" else 1)
    for field, held in moments.items():
        codes, wanted = held["kernel"].get_value()["codes"], getattr(state[0], field)["kernel"].codes
        assert codes.dtype == np.uint8 and codes.shape == (64, 128) and held["bias"].get_value().dtype == np.float32
        assert (np.asarray(codes) != np.asarray(wanted)).mean() < 0.01  # another program, whose float sums may end elsewhere
    stored = sum(a.nbytes for a in jax.tree.leaves(nnx.to_pure_dict(nnx.state(optimizer))))
    assert stored < len(moments) * (64 * 128 * 1.02 + 4 * 128) + 16
    for key, value in params.items():
        np.testing.assert_allclose(getattr(model, key).get_value(), value, atol=1e-4)


W = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
ADAM, LION = qjax.adam8bit(1e-3), qjax.lion8bit(1e-3)
STATES = [
    (ADAM, W, optax.adam(1e-3).init(W), "`state` must be the Adam8State that init .* got ScaleByAdamState"),
    (ADAM, W, LION.init(W), "`state` must be the Adam8State that init .* got Lion8State"),
    (LION, W, ADAM.init(W), "`state` must be the Lion8State that init .* got Adam8State"),
    (ADAM, W, None, "`state` must be what init of this optimizer gave, 2 states in a tuple, got NoneType"),
    (ADAM, W, (), "`state` must be what init of this optimizer gave, 2 states in a tuple, got tuple of 0"),
    (scale_by_adam8bit(), W, None, "`state` must be the Adam8State that init .* got NoneType"),
    (ADAM, {"w": W["w"]}, ADAM.init(W), "`updates` are of another tree than `state`: there is no gradient of 'b'; call init"),
    (LION, {**W, "c": W["b"]}, LION.init(W), "`updates` are of another tree than `state`: there is no moment of 'c'; call init"),
    (ADAM, [W["w"], W["b"]], ADAM.init(W), "`updates` are of another tree than `state`: there is no moment of '0'; call init"),
    (ADAM, {**W, "b": jnp.ones(1)}, ADAM.init(W), r"`state` holds a moment of shape \(64,\) for a gradient of shape \(1,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("tx", "grads", "state", "says"), STATES)
def test_a_state_of_another_optimizer_or_tree_is_refused(tx, grads, state, says):
    with pytest.raises((TypeError, ValueError), match=says):
        tx.update(grads, state, W)
