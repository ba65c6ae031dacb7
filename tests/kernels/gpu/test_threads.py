"""Kernels that several Python threads lower at once: `jit` is called from threads, and Mosaic keeps some of its state in globals."""

import concurrent.futures
import functools
import threading

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from qjax_kernels.gpu.tiles import Direct, Tiles

from tests.kernels.gpu.lowering import lowered

PAIR = Tiles(128, 128, 128, 4, warpgroups=2, scale_first=True)
CUT = Tiles(128, 192, 128, 2, warpgroups=3, scale_first=True)
LEFT = Tiles(128, 128, 128, 2, warpgroups=2, x_left=True, cluster=2)
CASES = [  # blocks hand each other sums in all of them: bits, M, N, K, tiles; the last has no part of Mosaic in it that chooses a thread
    (4, 256, 1024, 2048, PAIR),
    (4, 384, 1984, 2048, CUT),
    (8, 256, 1024, 2048, PAIR),
    (None, 512, 1024, 2048, LEFT),
    (4, 16, 1024, 4096, Tiles(16, 64, 512, 2, 2, warpgroups=2, digits=True)),
    (4, 16, 1024, 8192, Direct(16, 2, 1, split_k=4, wide=True)),
]


@pytest.fixture
def another():
    """A thread that lowers a kernel of its own and is where a single thread of the GPU runs, until the test ends."""
    inside, done = threading.Event(), threading.Event()

    @functools.partial(plgpu.kernel, out_type=jax.ShapeDtypeStruct((128,), jnp.float32))
    def kernel(out):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def hold(_, target):
            del target
            with mgpu_utils.single_thread(scope=mgpu_utils.ThreadSubset.WARPGROUP):
                inside.set()
                assert done.wait(timeout=120)

        hold(out)  # pyright: ignore[reportCallIssue]

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        lowering = pool.submit(lambda: jax.jit(kernel).trace().lower(lowering_platforms=("cuda",)))
        assert inside.wait(timeout=120)
        yield
        done.set()
        lowering.result()


@pytest.fixture(scope="module")
def alone():
    """What is lowered while no other thread lowers."""
    return [lowered(*case) for case in CASES]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_kernel_does_not_depend_on_what_another_thread_lowers(alone, number, another):
    assert alone[number]
    jax.clear_caches()
    assert lowered(*CASES[number]) == alone[number]
