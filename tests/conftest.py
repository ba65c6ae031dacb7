"""Two CPU devices for every test, so that sharding is tested for real; little optimization, because most of the time is compilation.

`.ci/run` runs some of them with XLA's usual optimization too: XLA_FLAGS=--xla_backend_optimization_level=3.
"""

import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XDG_CACHE_HOME"] = os.devnull  # nothing that `qjax tune` measured here
os.environ["COLUMNS"] = "140"  # tables do not depend on who looks
_GIVEN = os.environ.get("XLA_FLAGS", "")
# Half of what compilation still takes; later versions have no such switch, and abort.
_SWITCH = "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""
_QUICK = "" if "xla_backend_optimization_level" in _GIVEN else f"--xla_backend_optimization_level=0 {_SWITCH}"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {_QUICK} {_GIVEN}"

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def keep_compiled_programs_on_disk(tmp_path_factory):
    """Modules share what they compile, although memory forgets it after each. A folder for each worker: writing is not atomic."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Thousands of compiled programs would fill the memory of a long run."""
    yield
    jax.clear_caches()
