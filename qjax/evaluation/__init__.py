"""What a quantized model costs and how far it moved: perplexity, divergence, speed, memory.

Every function takes `apply(params, tokens) -> logits`; nothing here knows a framework or a kind of model.
"""

from qjax.evaluation.bootstrap import PairedInterval as PairedInterval
from qjax.evaluation.bootstrap import paired_bootstrap as paired_bootstrap
from qjax.evaluation.divergence import Divergence as Divergence
from qjax.evaluation.divergence import divergence as divergence
from qjax.evaluation.divergence import token_divergence as token_divergence
from qjax.evaluation.memory import ProgramMemory as ProgramMemory
from qjax.evaluation.memory import compiled_memory as compiled_memory
from qjax.evaluation.memory import peak_resident_bytes as peak_resident_bytes
from qjax.evaluation.memory import resident_bytes as resident_bytes
from qjax.evaluation.memory import tree_bytes as tree_bytes
from qjax.evaluation.perplexity import perplexity as perplexity
from qjax.evaluation.perplexity import perplexity_of as perplexity_of
from qjax.evaluation.perplexity import token_losses as token_losses
from qjax.evaluation.speed import Timing as Timing
from qjax.evaluation.speed import measure_speed as measure_speed
from qjax.evaluation.text import batches as batches
from qjax.evaluation.text import calibration_windows as calibration_windows
from qjax.evaluation.text import encode as encode
from qjax.evaluation.text import windows as windows
