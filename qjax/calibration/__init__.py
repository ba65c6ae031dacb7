"""Observers, and the collectors that run them."""

from qjax.calibration.observe import init_states as init_states
from qjax.calibration.observe import observe_program as observe_program
from qjax.calibration.observers import Moments as Moments
from qjax.calibration.observers import Observer as Observer
from qjax.calibration.observers import SecondMoment as SecondMoment
from qjax.calibration.observers import hessian as hessian
from qjax.calibration.rows import Rows as Rows
from qjax.calibration.rows import columns as columns
from qjax.calibration.rows import site_rows as site_rows
from qjax.calibration.rows import stack_size as stack_size
from qjax.calibration.rows import why_no_rows as why_no_rows
