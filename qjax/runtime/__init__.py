"""Runs packed parameters."""

from qjax_kernels.request import Device as Device
from qjax_kernels.request import Request as Request
from qjax_kernels.request import Weight as Weight

from qjax.runtime.attention import cache_kernel_of as cache_kernel_of
from qjax.runtime.attention import cached_attention as cached_attention
from qjax.runtime.cache import quantized_cache as quantized_cache
from qjax.runtime.device import device_of as device_of
from qjax.runtime.fused import fused_sites as fused_sites
from qjax.runtime.installed import installed_kernels as installed_kernels
from qjax.runtime.installed import runtime_of as runtime_of
from qjax.runtime.kernels import CacheKernel as CacheKernel
from qjax.runtime.kernels import Choice as Choice
from qjax.runtime.kernels import Codes as Codes
from qjax.runtime.kernels import Kernel as Kernel
from qjax.runtime.kernels import Layout as Layout
from qjax.runtime.kernels import Runtime as Runtime
from qjax.runtime.kernels import choose as choose
from qjax.runtime.overflow import Overflow as Overflow
from qjax.runtime.overflow import overflow as overflow
from qjax.runtime.prepack import prepack as prepack
from qjax.runtime.quantized import quantized as quantized
from qjax.runtime.request import Operands as Operands
