"""The small trained model and the texts that come with the package: for demonstrations, tests and comparisons."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from qjax.formats.huggingface import Checkpoint, load_checkpoint

_FOLDER = Path(__file__).parent / "data" / "books-llama-4m"


def books_llama_folder() -> Path:
    """Folder of books-llama-4m, a Llama of 4.2 million parameters (4 layers, width 256, context 256, tied embeddings).

    It was trained for this project on public-domain English books; the weights are under the project's license.

    Returns:
      The path, with config.json, model.safetensors (bfloat16), tokenizer.json, heldout.txt and calibration.txt.
    """
    return _FOLDER


def books_llama(param_dtype: Any = jnp.float32) -> Checkpoint:
    """Loads books-llama-4m.

    Args:
      param_dtype: float32 or bfloat16, of the parameters.

    Returns:
      Config, parameters and tokenizer.

    Example:
      >>> books_llama().config.num_hidden_layers
      4
    """
    return load_checkpoint(_FOLDER, param_dtype)


def heldout_text() -> str:
    """Text that books-llama-4m never saw: the last quarter of a novel, 58,078 tokens. For measuring."""
    return (_FOLDER / "heldout.txt").read_text(encoding="utf-8")


def calibration_lines() -> list[str]:
    """200 passages of books that books-llama-4m was trained on, each of more than 256 tokens. For calibration."""
    return (_FOLDER / "calibration.txt").read_text(encoding="utf-8").splitlines()
