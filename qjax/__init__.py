"""qjax: quantization for JAX. Trace any model, quantize it, run it packed, and see what it cost."""

from qjax import linen as linen
from qjax import nnx as nnx
from qjax.core import QTensor as QTensor
from qjax.core import bf16 as bf16
from qjax.core import codebook as codebook
from qjax.core import fp4 as fp4
from qjax.core import fp16 as fp16
from qjax.core import int2 as int2
from qjax.core import int3 as int3
from qjax.core import int4 as int4
from qjax.core import int5 as int5
from qjax.core import int6 as int6
from qjax.core import int7 as int7
from qjax.core import int8 as int8
from qjax.core import integer as integer
from qjax.core import nf4 as nf4
from qjax.core import uint2 as uint2
from qjax.core import uint3 as uint3
from qjax.core import uint4 as uint4
from qjax.core import uint5 as uint5
from qjax.core import uint6 as uint6
from qjax.core import uint7 as uint7
from qjax.core import uint8 as uint8
from qjax.formats.checkpoint import load as load
from qjax.formats.checkpoint import save as save
from qjax.policy import Policy as Policy
from qjax.policy import Rule as Rule
from qjax.program import Program as Program
from qjax.program import trace as trace
from qjax.ptq import Result as Result
from qjax.ptq import gptq as gptq
from qjax.ptq import quantize as quantize
from qjax.ptq import rtn as rtn
from qjax.ptq import sites as sites
from qjax.report import Report as Report
from qjax.runtime import quantized as quantized
from qjax.training import fake_quant as fake_quant

__version__ = "0.1.0"
