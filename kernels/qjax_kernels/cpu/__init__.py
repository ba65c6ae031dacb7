"""Kernels for CPUs: products of float or rounded activations with weights of 2, 3, 4 and 8 bits, in C++ behind `jax.ffi`."""

from qjax_kernels.cpu.layout import LAYOUT_VERSION as LAYOUT_VERSION
from qjax_kernels.cpu.layout import Columns as Columns
from qjax_kernels.cpu.layout import Layout as Layout
from qjax_kernels.cpu.layout import Packed as Packed
from qjax_kernels.cpu.layout import gather_columns as gather_columns
from qjax_kernels.cpu.layout import gather_rows as gather_rows
from qjax_kernels.cpu.layout import prepack as prepack
from qjax_kernels.cpu.layout import unpack as unpack
from qjax_kernels.cpu.library import INSTRUCTION_SETS as INSTRUCTION_SETS
from qjax_kernels.cpu.library import best_instruction_set as best_instruction_set
from qjax_kernels.cpu.library import why_not_loaded as why_not_loaded
from qjax_kernels.cpu.matmul import Rounding as Rounding
from qjax_kernels.cpu.matmul import matmul as matmul
from qjax_kernels.cpu.matmul import matmul_codes as matmul_codes
from qjax_kernels.cpu.matmul import ragged_matmul as ragged_matmul
from qjax_kernels.cpu.matmul import why_not as why_not
