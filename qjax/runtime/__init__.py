"""Runs packed parameters."""

from qjax.runtime.overflow import Overflow as Overflow
from qjax.runtime.overflow import overflow as overflow
from qjax.runtime.quantized import quantized as quantized
