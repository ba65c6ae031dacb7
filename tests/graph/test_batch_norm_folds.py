"""What `qjax.batch_norm_folds` refuses, it says in the words of its arguments, whatever Flax says. What it finds: tests/training."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from flax.errors import ScopeParamShapeError

import qjax


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))


class Net2(nnx.Module):
    def __init__(self):
        self.dense, self.norm = nnx.Linear(5, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.dense(x))


X, MODEL, MODEL2 = jnp.ones((3, 5)), Net(), Net2()
VARIABLES = MODEL.init(jax.random.key(0), X)
BARE = VARIABLES["params"]
LACKS = r"`params` lacks what the module reads \(Tried .*: give all of its variables as model.init returns them, .'params'"
MODULE = r"`fn` must be a function of \(params, \*args\), got the module Net2?: give model.apply .* qjax.nnx.function\(model\)"
TRAINING = r"`fn` updates its statistics, as in training \(Cannot update variable .mean.*\): give the function in evaluation, train=False"


@pytest.mark.parametrize(
    ("fn", "params", "kwargs", "error", "message"),
    [
        (MODEL, VARIABLES, {}, TypeError, MODULE),
        (MODEL, VARIABLES, {"train": False}, TypeError, MODULE),
        (Net, VARIABLES, {}, TypeError, MODULE),
        (MODEL.bind(VARIABLES), VARIABLES, {}, TypeError, MODULE),
        (MODEL2, nnx.state(MODEL2), {}, TypeError, MODULE),
        (MODEL.apply, BARE, {}, ValueError, LACKS),
        (MODEL.apply, BARE, {}, ValueError, r"got 'Dense_0', 'BatchNorm_0': give all"),
        (lambda v, x: MODEL.apply(v, x), BARE, {}, ValueError, LACKS),
        (jax.jit(MODEL.apply), {"params": BARE}, {}, ValueError, LACKS),
        (MODEL.apply, {"params": BARE}, {}, ValueError, r"from collection \"batch_stats\" .* got 'params': give all"),
        (MODEL.apply, {}, {}, ValueError, r"`params` holds no arrays, got \{\}: give the function's parameters with"),
        (MODEL.apply, None, {}, ValueError, r"`params` holds no arrays, got None"),
        (MODEL.apply, VARIABLES, {"train": True}, ValueError, TRAINING),
        (functools.partial(MODEL.apply, train=True), VARIABLES, {}, ValueError, TRAINING),
        (lambda v, x: MODEL.apply(v, x, train=True, mutable=["batch_stats"]), VARIABLES, {}, ValueError, "give the function in"),
        (qjax.nnx.function(MODEL2), nnx.state(MODEL2), {}, ValueError, r"of an NNX module after model.eval\(\)"),
    ],
)
def test_what_to_give_is_said(fn, params, kwargs, error, message):
    with pytest.raises(error, match=message):
        qjax.batch_norm_folds(fn, params, X, **kwargs)


def test_other_errors_of_a_function_stay_what_they_are():
    with pytest.raises(ScopeParamShapeError):
        qjax.batch_norm_folds(MODEL.apply, VARIABLES, jnp.ones((3, 6)))
