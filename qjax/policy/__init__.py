"""Policy: ordered rules that say which parameters are quantized, and how."""

from qjax.policy.resolve import CacheChoice as CacheChoice
from qjax.policy.resolve import Choice as Choice
from qjax.policy.resolve import Policy as Policy
from qjax.policy.resolve import ProductChoice as ProductChoice
from qjax.policy.resolve import check_module as check_module
from qjax.policy.resolve import check_not_learned as check_not_learned
from qjax.policy.resolve import check_policy as check_policy
from qjax.policy.resolve import is_candidate as is_candidate
from qjax.policy.resolve import no_product as no_product
from qjax.policy.resolve import no_site_reason as no_site_reason
from qjax.policy.rule import ChoosesActivation as ChoosesActivation
from qjax.policy.rule import Method as Method
from qjax.policy.rule import RotatesInputs as RotatesInputs
from qjax.policy.rule import Rule as Rule
from qjax.policy.rule import Trains as Trains
from qjax.policy.rule import TrainsBeside as TrainsBeside
from qjax.program.trace import path_str as path_str
