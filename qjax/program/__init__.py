"""A function becomes a jaxpr, the jaxpr becomes sites, and the interpreter runs it with packed parameters."""

from qjax.program import compat as compat
from qjax.program.caches import InputLeaf as InputLeaf
from qjax.program.flatten import Graph as Graph
from qjax.program.flatten import flatten as flatten
from qjax.program.interpret import Interpreter as Interpreter
from qjax.program.interpret import plain_rule as plain_rule
from qjax.program.packed import Packed as Packed
from qjax.program.packed import materialize as materialize
from qjax.program.products import Product as Product
from qjax.program.queries import Producer as Producer
from qjax.program.queries import producer as producer
from qjax.program.queries import shared_inputs as shared_inputs
from qjax.program.sites import Key as Key
from qjax.program.sites import Leaf as Leaf
from qjax.program.sites import Site as Site
from qjax.program.trace import Arguments as Arguments
from qjax.program.trace import Program as Program
from qjax.program.trace import ProgramCache as ProgramCache
from qjax.program.trace import check_function as check_function
from qjax.program.trace import split_arguments as split_arguments
from qjax.program.trace import trace as trace
