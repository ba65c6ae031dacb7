"""Makes llama_logits.npz: logits of transformers (PyTorch), which the tests compare with and never need to run.

  pip install "torch==2.13.0" "transformers>=5" && python tests/golden/make_llama_logits.py

Cases, all computed in float32 on a CPU:
  books    the shipped model, 16 tokens, full logits of the last and every 37th logit of all, and a greedy continuation
  biased   untied, biases everywhere, 6 heads of 6 with 2 key/value heads, rotary scaling "llama3" that takes effect
  mistral  a MistralForCausalLM without a sliding window
The tensors of the last two are kept under `NAME/tensor/...`, their config.json under `NAME/config`.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
SHIPPED = HERE.parent.parent / "qjax" / "models" / "data" / "books-llama-4m"
TINY = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {  # turns over the original context 5.1, 2.0 and 0.8: one frequency is kept, one on the ramp, one divided
    "rope_type": "llama3",
    "rope_theta": 16.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval().float()(torch.from_numpy(tokens).long()).logits.numpy()


def tiny(name: str, config, model_class, rng: np.random.Generator) -> dict[str, np.ndarray]:
    config._attn_implementation = "eager"
    model = model_class(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = 0.1 if parameter.ndim == 1 else 0.4
            values = rng.normal(0.0, spread, tuple(parameter.shape)) + (1.0 if "norm" in key else 0.0)
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    tokens = rng.integers(0, config.vocab_size, (2, 48)).astype(np.int32)
    stored = {f"{name}/tensor/{key}": value.numpy() for key, value in model.state_dict().items()}
    text = json.dumps(config.to_dict() | {"architectures": [model_class.__name__]}, default=str)
    return stored | {
        f"{name}/config": np.array(text),
        f"{name}/tokens": tokens,
        f"{name}/logits": logits(model, tokens),
    }


def books(rng: np.random.Generator) -> dict[str, np.ndarray]:
    model = transformers.LlamaForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    tokens = rng.integers(3, 4096, (1, 16)).astype(np.int32)
    tokens[0, 0] = 1
    found = logits(model, tokens)
    greedy = model.generate(torch.from_numpy(tokens).long(), max_new_tokens=40, do_sample=False, eos_token_id=None)
    return {
        "books/tokens": tokens,
        "books/last": found[:, -1:],
        "books/every37": found[:, :, ::37],
        "books/greedy": greedy.numpy().astype(np.int32),
    }


def main() -> None:
    rng = np.random.default_rng(20)
    biased = transformers.LlamaConfig(**TINY, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3)
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    mistral = transformers.MistralConfig(**TINY, sliding_window=None, rope_parameters=plain)
    found = books(rng)
    found |= tiny("biased", biased, transformers.LlamaForCausalLM, rng)
    found |= tiny("mistral", mistral, transformers.MistralForCausalLM, rng)
    found["versions"] = np.array(f"transformers {transformers.__version__}, torch {torch.__version__}")
    np.savez_compressed(HERE / "llama_logits.npz", **found)


if __name__ == "__main__":
    main()
