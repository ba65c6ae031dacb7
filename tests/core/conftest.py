import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    """A silent promotion of dtype or rank is a bug here, not a convenience."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
