"""Function-preserving rewrites, found by data flow in any program."""

from qjax.graph.batch_norm import BatchNormFold as BatchNormFold
from qjax.graph.batch_norm import Folded as Folded
from qjax.graph.batch_norm import fold_batch_norm as fold_batch_norm
from qjax.graph.equalize import Equalized as Equalized
from qjax.graph.equalize import Pair as Pair
from qjax.graph.equalize import equalize as equalize
from qjax.graph.fold import Fold as Fold
from qjax.graph.fold import NoFold as NoFold
from qjax.graph.fold import Scaling as Scaling
from qjax.graph.fold import apply_fold as apply_fold
from qjax.graph.fold import channels as channels
from qjax.graph.fold import find_fold as find_fold
from qjax.graph.fold import find_folds as find_folds
from qjax.graph.solve import System as System
from qjax.graph.solve import build as build
from qjax.graph.verify import NotPreserved as NotPreserved
from qjax.graph.verify import exact_scales as exact_scales
from qjax.graph.verify import rounding as rounding
from qjax.graph.verify import verifier as verifier
from qjax.graph.verify import verify as verify
from qjax.graph.verify import verify_fold as verify_fold
