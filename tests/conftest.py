"""Two CPU devices for every test, so that sharding is tested for real; little optimization, because most of the time is compilation.

`.ci/run` runs some of them with XLA's usual optimization too: XLA_FLAGS=--xla_backend_optimization_level=3.
"""

import gc
import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XDG_CACHE_HOME"] = os.devnull  # nothing that `qjax tune` measured here
os.environ["COLUMNS"] = "140"  # tables do not depend on who looks
_GIVEN = os.environ.get("XLA_FLAGS", "")
# Half of what compilation still takes; later versions have no such switch, and abort.
_SWITCH = "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""
_QUICK = "" if "xla_backend_optimization_level" in _GIVEN else f"--xla_backend_optimization_level=0 {_SWITCH}"
# Two workers share two cores: cutting a small program into pieces that are compiled in parallel only costs.
_WHOLE = "--xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {_WHOLE} {_QUICK} {_GIVEN}"

# Blocks of an interpreted GPU kernel wait for each other inside callbacks, each of which holds a thread of XLA's pool: with as many threads
# as there are cores, two that wait keep out the one they wait for, and the run stands still.
_GIVEN_THREADS = os.environ.get("NPROC")
os.environ["NPROC"] = _GIVEN_THREADS or "16"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.devices()  # makes the pool; processes that tests start are as those of users
if _GIVEN_THREADS is None:
    del os.environ["NPROC"]

# Tracing makes cycles by the thousand; looking for them that often takes a twentieth of a run.
gc.set_threshold(50_000, 20, 50)

LONG = ("cli/test_demo.py", "experiments/test_benches.py", "ptq/test_shipped_model.py", "ptq/test_memory.py", "test_notebooks.py")


def pytest_collection_modifyitems(items):
    """The modules of the longest tests come first, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))


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
