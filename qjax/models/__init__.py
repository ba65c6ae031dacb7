"""Flax definitions of the public families that checkpoints come in."""

from qjax.models.call import prepacked as prepacked
from qjax.models.generate import Generation as Generation
from qjax.models.generate import generate as generate
from qjax.models.llama import Llama as Llama
from qjax.models.llama import LlamaConfig as LlamaConfig
from qjax.models.llama import init_cache as init_cache
from qjax.models.llama import stack_layers as stack_layers
from qjax.models.llama import unstack_layers as unstack_layers
from qjax.models.shipped import books_llama as books_llama
from qjax.models.shipped import books_llama_folder as books_llama_folder
from qjax.models.shipped import calibration_lines as calibration_lines
from qjax.models.shipped import heldout_text as heldout_text
from qjax.models.speculative import Decoder as Decoder
from qjax.models.speculative import speculate as speculate
