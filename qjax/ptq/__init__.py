"""Post-training quantization: one file a method, all behind `Method`."""

from qjax.calibration import as_batches as as_batches
from qjax.ptq.awq import awq as awq
from qjax.ptq.bias_correction import correct_bias as correct_bias
from qjax.ptq.gptq import gptq as gptq
from qjax.ptq.hqq import hqq as hqq
from qjax.ptq.kmeans import kmeans as kmeans
from qjax.ptq.llm_int8 import llm_int8 as llm_int8
from qjax.ptq.low_rank import low_rank as low_rank
from qjax.ptq.method import Method as Method
from qjax.ptq.method import Outcome as Outcome
from qjax.ptq.method import Problem as Problem
from qjax.ptq.plan import Plan as Plan
from qjax.ptq.plan import Rates as Rates
from qjax.ptq.plan import plan as plan
from qjax.ptq.progress import Progress as Progress
from qjax.ptq.quantize import Result as Result
from qjax.ptq.quantize import quantize as quantize
from qjax.ptq.quantize import sites as sites
from qjax.ptq.rewrite import Rewritten as Rewritten
from qjax.ptq.rewrite import batch_norm_folding as batch_norm_folding
from qjax.ptq.rewrite import equalization as equalization
from qjax.ptq.rewrite import rewrite as rewrite
from qjax.ptq.rewrite import rotation as rotation
from qjax.ptq.rtn import rtn as rtn
from qjax.ptq.smoothquant import smoothquant as smoothquant
from qjax.ptq.spill import Spill as Spill
