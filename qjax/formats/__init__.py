"""Reading and writing models: packed checkpoints, and the formats that the world uses."""

from qjax.formats.checkpoint import fingerprint as fingerprint
from qjax.formats.checkpoint import load as load
from qjax.formats.checkpoint import read_document as read_document
from qjax.formats.checkpoint import save as save
from qjax.formats.peft import llama_modules as llama_modules
from qjax.formats.peft import load_peft as load_peft
from qjax.formats.peft import save_peft as save_peft
