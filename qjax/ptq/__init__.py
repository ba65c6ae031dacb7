"""Post-training quantization: one file a method, all behind `Method`."""

from qjax.calibration import as_batches as as_batches
from qjax.ptq.awq import awq as awq
from qjax.ptq.gptq import gptq as gptq
from qjax.ptq.method import Method as Method
from qjax.ptq.method import Outcome as Outcome
from qjax.ptq.method import Problem as Problem
from qjax.ptq.quantize import Result as Result
from qjax.ptq.quantize import quantize as quantize
from qjax.ptq.quantize import sites as sites
from qjax.ptq.rtn import rtn as rtn
from qjax.ptq.smoothquant import smoothquant as smoothquant
