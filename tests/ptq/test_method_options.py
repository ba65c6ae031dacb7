"""What methods refuse alike: options of another type, read as none that fits, and specs that leave them nothing to choose."""

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax.ptq.method import Problem

FLAG, COUNT = "must be True or False, got {!r}", "must be an int of at least 1, got {!r}"
CASES = [
    *((make, name, "no", FLAG) for make in (qjax.gptq, qjax.gptaq) for name in ("act_order", "static_groups", "mse", "group_aware")),
    *((make, name, 3, FLAG) for make, name in ((qjax.rtn, "mse"), (qjax.awq, "clip"), (qjax.autoround, "mse"), (qjax.kmeans, "weighted"))),
    *((make, name, value, COUNT) for make, name in ((qjax.awq, "grid"), (qjax.awq, "rows"), (qjax.smoothquant, "rows"))
      for value in (2.5, True, 0)),
    *((make, name, value, "must be .*number.*, got {!r}") for make, name in ((qjax.gptq, "damping"), (qjax.smoothquant, "alpha"),
      (qjax.hqq, "lp_norm"), (qjax.hqq, "beta"), (qjax.gptaq, "damping")) for value in ("a", True)),
    *((make, name, value, "must be .* 0.*, got {!r}") for make, name in ((qjax.autoround, "lr"), (qjax.gptaq, "alpha"))
      for value in ("a", True)),
]  # fmt: skip


@pytest.mark.parametrize(("make", "name", "value", "said"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_an_option_of_another_type_is_refused_by_name(make, name, value, said):
    with pytest.raises((ValueError, TypeError), match=f"^`{name}` {said.format(value)}"):
        make(**{name: value})


def test_a_method_in_the_place_of_a_number_is_told_where_it_goes():
    with pytest.raises(TypeError, match=r"`grid` is the number of ratios that are tried, got the method gptq: write awq\(then=...\)"):
        qjax.awq(qjax.gptq())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"fn": 3}, r"`fn` must be a function of \(params, \*args\), got int"),
     ({"spill": 3}, "`spill` must be a qjax.Spill or None, got int"),
     ({"progress": "yes"}, "`progress` must be a function of a qjax.Progress or None, got str"),
     ({"resume": 3}, "`resume` must be the path of a folder, got int")],
)  # fmt: skip
def test_an_argument_of_another_type_is_refused_by_name(changed, said):
    given = {"fn": lambda p, x: x @ p, "params": jnp.ones((4, 2)), "policy": qjax.Policy([qjax.Rule("*", weight=qjax.int8())]),
             "calibration": [jnp.ones((1, 4))]}  # fmt: skip
    with pytest.raises(TypeError, match=said):
        qjax.quantize(**(given | changed))
    with pytest.raises(TypeError, match="`fn` must be a function"):
        qjax.fake_quant(3, given["policy"])  # pyright: ignore[reportArgumentType]


def test_a_checkpoint_is_not_replaced_for_a_word(tmp_path):
    qjax.save(tmp_path / "c", {"w": jnp.ones(2)})
    with pytest.raises(TypeError, match="`overwrite` must be True or False, got 'no'"):
        qjax.save(tmp_path / "c", {"w": jnp.zeros(2)}, overwrite="no")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="`verify` must be True or False, got 'no'"):
        qjax.load(tmp_path / "c", verify="no")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="`path` must be a path, got int"):
        qjax.load(5)  # pyright: ignore[reportArgumentType]
    assert qjax.load(tmp_path / "c").params["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "method",
    [qjax.gptq(), qjax.gptaq(), qjax.awq(), qjax.awq(then=qjax.rtn()), qjax.hqq(), qjax.kmeans(), qjax.autoround()],
    ids=lambda m: m.name,
)
def test_a_cast_leaves_nothing_to_choose(method):
    with pytest.raises(ValueError, match=r"nothing to choose for the cast bf16\(\) of 'up'; leave `method` out$"):
        method.shapes(Problem(jax.ShapeDtypeStruct((8, 4), jnp.float32), qjax.bf16(), (-2,), (), 1, "up"))


def test_a_search_of_ranges_that_there_are_none_of_is_said():
    for spec, why in ((qjax.bf16(), "a cast has none"), (qjax.learned(2), "its table is learned"), (qjax.int4(), None)):
        problem = Problem(jnp.linspace(-1.0, 1.0, 32).reshape(8, 4), spec, (-2,), (), 1, "up")
        assert qjax.rtn(mse=True).quantize(problem).notes == ((f"its ranges are not searched: {why}",) if why else ())
