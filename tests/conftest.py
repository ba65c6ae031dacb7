"""Two CPU devices for every test, so that sharding is tested for real; strict about what jax does silently."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Thousands of compiled programs would fill the memory of a long run."""
    yield
    jax.clear_caches()
