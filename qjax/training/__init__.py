"""Training through quantization."""

from qjax.training.adapted import Adapted as Adapted
from qjax.training.adapted import check_trainable as check_trainable
from qjax.training.convert import convert as convert
from qjax.training.dorefa import DoReFa as DoReFa
from qjax.training.dorefa import dorefa as dorefa
from qjax.training.fake_quant import FakeQuant as FakeQuant
from qjax.training.fake_quant import fake_quant as fake_quant
from qjax.training.learned_rotation import LearnedRotation as LearnedRotation
from qjax.training.learned_rotation import learn_rotation as learn_rotation
from qjax.training.lora import Lora as Lora
from qjax.training.lora import lora as lora
from qjax.training.lsq import LearnedStep as LearnedStep
from qjax.training.lsq import lsq as lsq
from qjax.training.pact import Clipped as Clipped
from qjax.training.pact import pact as pact
from qjax.training.qat import QAT as QAT
from qjax.training.qat import qat as qat
from qjax.training.qlora import QLoRA as QLoRA
from qjax.training.qlora import qlora as qlora
from qjax.training.schedule import Schedule as Schedule
from qjax.training.schedule import schedule as schedule
from qjax.training.straight_through import StraightThrough as StraightThrough
from qjax.training.straight_through import ste as ste
from qjax.training.straight_through import straight_through as straight_through
