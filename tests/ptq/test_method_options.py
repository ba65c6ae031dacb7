"""Options of another type are refused when a method is built, not read as one that fits."""

import pytest

import qjax

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
