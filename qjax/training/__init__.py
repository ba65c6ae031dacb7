"""Training through quantization."""

from qjax.training.fake_quant import FakeQuant as FakeQuant
from qjax.training.fake_quant import fake_quant as fake_quant
from qjax.training.learned_rotation import LearnedRotation as LearnedRotation
from qjax.training.learned_rotation import learn_rotation as learn_rotation
from qjax.training.straight_through import straight_through as straight_through
