"""Runs packed parameters."""

from qjax.runtime.cache import quantized_cache as quantized_cache
from qjax.runtime.overflow import Overflow as Overflow
from qjax.runtime.overflow import overflow as overflow
from qjax.runtime.quantized import quantized as quantized
