"""What the kernels refuse, with the reason, and how their library is built and found."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qjax_kernels import cpu
from qjax_kernels.cpu import build, library
from qjax_kernels.request import Device, Request, Weight

CPU = Device("cpu", "avx2")
HERE = library.load()
needs_kernels = pytest.mark.skipif(bool(HERE.reason), reason=HERE.reason or "there")


@pytest.fixture(scope="module")
def packed():
    return cpu.prepack(np.ones((20, 64), np.int8), np.ones((20, 2)), bits=4, group_size=32)


def test_kernels_are_there_where_a_compiler_is():
    if any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        assert cpu.why_not_loaded() == ""
        assert "plain" in HERE.instruction_sets and cpu.best_instruction_set() == HERE.instruction_sets[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": Device("cuda", "sm_90a")}, "made for CPUs"),
        ({"weight": Weight("fp8", 8)}, "FP8 codes"),
        ({"weight": Weight("int", 5)}, "codes of 5 bits"),
        ({"weight": Weight("codebook", 8)}, "room for 16"),
        ({"weight": Weight("codebook", 4), "activation": "int8"}, "no integers"),
        ({"activation": "fp8"}, "FP8 activations"),
        ({"activation": "int8", "k": 40000, "weight": Weight("int", 8)}, "overflow"),
    ],
)
def test_why_not(change, reason):
    request = dataclasses.replace(Request(CPU, 1, 64, 64, Weight("int", 4, 32)), **change)
    assert reason in cpu.why_not(request)


@needs_kernels
def test_why_not_runs_what_it_says():
    request = Request(CPU, 3, 20, 64, Weight("int", 4, 32), activation="int8")
    assert cpu.why_not(request) == ""
    missing = [name for name in library.INSTRUCTION_SETS if name not in HERE.instruction_sets]
    for name in missing:
        assert name in cpu.why_not(request, name)
        with pytest.raises(ValueError, match=name):
            cpu.matmul(jnp.ones((1, 64)), cpu.prepack(np.ones((20, 64), np.int8), np.ones(20), bits=4), instruction_set=name)
    assert "no instruction set is called" in cpu.why_not(request, "sse9")


@needs_kernels
def test_refused_arguments(packed):
    x = jnp.ones((2, 64))
    for bad, message in [
        ((x[:, :63], packed), "`x` must be"),
        ((x, dataclasses.replace(packed, layout=dataclasses.replace(packed.layout, version=0))), "layout version 0"),
        ((x, dataclasses.replace(packed, codes=packed.codes[:, :1])), "`weight` must hold codes"),
        ((x, dataclasses.replace(packed, scales=packed.scales.astype(jnp.bfloat16))), "`weight` must hold scales"),
    ]:
        with pytest.raises(ValueError, match=message):
            cpu.matmul(*bad)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        cpu.matmul(x.astype(jnp.float16), packed)
    with pytest.raises(TypeError, match="must be int8"):
        cpu.matmul_codes(x, jnp.ones((2, 1)), packed)
    with pytest.raises(ValueError, match="`rounding`"):
        cpu.matmul(x, packed, rounding=cpu.Rounding(127.0, -200, 127))
    table = cpu.prepack(np.ones((20, 64), np.int8), np.ones(20), bits=4, signed=False, table=np.arange(16.0))
    with pytest.raises(ValueError, match="has a table"):
        cpu.matmul(x, table, rounding=cpu.Rounding())
    with pytest.raises(ValueError, match="one for each part"):
        cpu.ragged_matmul(x, packed, jnp.array([2]))


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 7}, "layout version 7"),
        ({"bits": 8}, "`codes`"),
        ({"group": 16}, "`codes`|`scales`"),
        ({"isa": 9}, "instruction set"),
        ({"k": 63}, "`x`|`codes`"),
    ],
)
def test_the_library_checks_for_itself(packed, change, message):
    """A program that was exported with another package reaches the library without Python's checks."""
    facts = {"version": 1, "bits": 4, "k": 64, "n": 20, "group": 32, "isa": 0, "integer": 0, "low": -128, "high": 127}
    attributes = {name: np.int64(value) for name, value in {**facts, **change}.items()}
    none = jnp.zeros(0)
    call = jax.ffi.ffi_call(library.TARGET, jax.ShapeDtypeStruct((1, 2, 20), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(
            call(jnp.ones((1, 2, 64)), none, packed.codes, packed.scales, packed.zeros, packed.table, none.astype(jnp.int32),
                 divisor=np.float32(127), **attributes)
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "`bits`"),
        ({"bits": 4, "group_size": 0}, "`group_size`"),
        ({"bits": 4, "group_size": 16}, "`scales` must be"),
        ({"bits": 4, "zero_points": np.ones(3)}, "`zero_points` must be"),
        ({"bits": 4, "table": np.ones(16)}, "unsigned indices"),
        ({"bits": 2, "signed": False, "table": np.ones(16)}, "`table` must hold 4"),
    ],
)
def test_prepack_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        cpu.prepack(np.ones((4, 32), np.int8), np.ones(4), **arguments)
    with pytest.raises(TypeError, match="integers"):
        cpu.prepack(np.ones((4, 32)), np.ones(4), bits=4)


def test_versions_of_the_interface(monkeypatch):
    class Library:
        def __init__(self, major, minor, layout):
            self.qjax_cpu_api_major, self.qjax_cpu_api_minor = (lambda: major), (lambda: minor)
            self.qjax_cpu_layout_version = lambda: layout

    monkeypatch.setattr(library, "ffi_version", lambda header: (0, 3))
    assert library._why_not(Library(0, 3, 1)) == "" and library._why_not(Library(0, 2, 1)) == ""
    assert "built for version 0.4" in library._why_not(Library(0, 4, 1))
    assert "built for version 1.0" in library._why_not(Library(1, 0, 1))
    assert "layout version 2" in library._why_not(Library(0, 3, 2))


def test_a_header_without_a_version():
    with pytest.raises(ValueError, match="declares no"):
        library.ffi_version("nothing")


def test_a_folder_without_a_library_and_one_with_rubbish(tmp_path):
    assert "were not built" in library.load(tmp_path).reason
    rubbish = tmp_path / "rubbish"
    rubbish.mkdir()
    (rubbish / "libqjax_cpu.so").write_text("no library")
    assert "cannot be loaded" in library.load(rubbish).reason


def test_building_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.compiler()
    assert build.flags_of("neon", "aarch64")[-1].endswith("dotprod") and build.flags_of("avx2", "aarch64") == build.flags_of("plain")
    assert (build.headers() / "xla" / "ffi" / "api" / "ffi.h").exists()
