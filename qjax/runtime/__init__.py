"""Runs packed parameters."""

from qjax.runtime.quantized import quantized as quantized
