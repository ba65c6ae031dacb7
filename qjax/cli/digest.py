"""`python -m qjax.cli.digest FOLDER TOKENS`: the logits of a packed checkpoint in a process of its own, as a SHA-256.

`qjax demo` runs it to show that what was saved is what was computed with, to the last bit.
"""

import hashlib
import json
import os
import sys
from typing import Any

from qjax.cli.shared import Model, open_model


def digest(model: Model, tokens: Any) -> dict[str, Any]:
    """The SHA-256 of the bytes of float32 logits.

    Args:
      model: the model.
      tokens: (B, T) int32.

    Returns:
      `sha256`, the number of logits, and the process.
    """
    import numpy as np

    logits = np.asarray(model.forward(model.params, np.asarray(tokens, np.int32)), np.float32)
    return {"sha256": hashlib.sha256(logits.tobytes()).hexdigest(), "logits": logits.size, "process": os.getpid()}


if __name__ == "__main__":
    print(json.dumps(digest(open_model(sys.argv[1]), json.loads(sys.stdin.read()))))
