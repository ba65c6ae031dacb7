"""What works for every model knows none by name."""

import pathlib
import re

import pytest

import qjax

ROOT = pathlib.Path(qjax.__file__).parent
WORDS = (
    "llama", "bert", "roberta", "mistral", "mixtral", "gpt", "gpt2", "gptj", "neox", "qwen", "qwen2", "gemma", "phi", "falcon", "bloom",
    "opt", "t5", "resnet", "vgg", "mobilenet", "efficientnet", "densenet", "vit", "whisper", "mamba", "deepseek", "transformers",
    "[qkvo]_proj", "qkv_proj", "(gate|up|down|in|out)_proj", "lm_head", "embed_tokens", "self_attn", "c_attn", "c_proj", "c_fc",
    "wte", "wpe", "fc1", "fc2", "input_layernorm", "post_attention_layernorm", "router", "moe", "encoder", "decoder",
)  # fmt: skip
NAME = re.compile(rf"(?<![A-Za-z0-9])({'|'.join(WORDS)})(?![A-Za-z0-9])", re.IGNORECASE)
# (file, line) of what may stand: papers and programs that a docstring cites as its source. So far there is none.
ALLOWED: set[tuple[str, str]] = set()


@pytest.mark.parametrize("room", ["ptq", "graph", "calibration", "program"])
def test_no_architecture_is_named(room):
    found = set()
    for path in sorted((ROOT / room).rglob("*.py")):
        for line in path.read_text().splitlines():
            if NAME.search(line):
                found.add((str(path.relative_to(ROOT)), line.strip()))
    assert found <= ALLOWED, found - ALLOWED


def test_the_search_finds_names():
    lines = ['if "q_proj" in path:', "model.layers.0.self_attn.v", "BERT", "MOE_KEYS = ()", 'name == "gpt2"']
    assert all(NAME.search(line) for line in lines)
    assert not any(NAME.search(line) for line in ("an option", "optimal", "gptq", "rope of words", "qjax.opts"))
