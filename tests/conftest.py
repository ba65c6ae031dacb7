"""Two CPU devices for every test, so that sharding is tested for real; little optimization, because most of the time is compilation.

`.ci/run` runs the slow tests with XLA's usual optimization: XLA_FLAGS=--xla_backend_optimization_level=3.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The last of two equal flags counts: what the environment says.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Thousands of compiled programs would fill the memory of a long run."""
    yield
    jax.clear_caches()
