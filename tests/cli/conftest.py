"""A tiny random Llama with a tokenizer of bytes, as a Hugging Face folder; and a way to run commands."""

import json

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qjax.cli.main import main
from qjax.formats.huggingface import save_checkpoint
from qjax.models import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    bos_token_id=1,
    eos_token_ids=(2,),
)


def byte_tokenizer():
    """A token a byte, three special ones before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: i for i, letter in enumerate(alphabet, start=3)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a float model, stored in bfloat16; weights large enough that its predictions are not uniform."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    params = Llama(CONFIG).init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    wider = jax.tree.map(lambda w: w * (8 if w.ndim == 2 else 1), params)
    save_checkpoint(folder, CONFIG, wider, byte_tokenizer(), jnp.bfloat16)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text of 12 windows of 32 bytes and a bit."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"{n} bottles of beer on the wall" for n in range(13)))
    return path


@pytest.fixture(scope="session")
def passages(tmp_path_factory):
    """40 lines longer than a window of 32."""
    path = tmp_path_factory.mktemp("text") / "passages.txt"
    path.write_text("\n".join(f"passage {n * 7919} says something about {n * n} sheep" for n in range(40)))
    return path


@pytest.fixture(scope="session")
def packed(tiny, tmp_path_factory):
    """`tiny` in 4 bits, made by the command."""
    folder = tmp_path_factory.mktemp("models") / "packed"
    result = invoke("quantize", tiny, folder, "--weight", "int4", "--group-size", 16)
    assert result.exit_code == 0, result.stderr
    return folder


def invoke(*arguments):
    """Runs a command in this process, in a terminal of 80 columns."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(main, [str(argument) for argument in arguments])


def json_of(*arguments):
    """Runs a command with --json; what it wrote to stdout, parsed. The parser refuses NaN, which is no JSON."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr or result.exception
    return json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def error_of(*arguments, code):
    """Runs a command that must fail with one line on stderr and nothing on stdout; the line."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), (result.stderr, result.exception)
    assert result.stderr.startswith("qjax: error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr
