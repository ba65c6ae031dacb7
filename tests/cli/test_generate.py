"""`qjax generate`."""

import jax
import jax.numpy as jnp
import pytest

from qjax.cli.generate import Stream
from qjax.formats.huggingface import load_checkpoint
from qjax.models import Llama

from .conftest import byte_tokenizer, error_of, invoke, json_of


def test_greedy_takes_the_likeliest_token(tiny):
    checkpoint = load_checkpoint(tiny)
    ids = [1, *checkpoint.tokenizer.encode("On the").ids]
    forward, wanted = jax.jit(Llama(checkpoint.config).apply), []
    for _ in range(6):
        seen = ids + wanted
        logits = forward({"params": checkpoint.params}, jnp.asarray([seen + [0] * (32 - len(seen))]))  # causal: the rest is not seen
        wanted.append(int(jnp.argmax(logits[0, len(seen) - 1])))
    found = json_of("generate", tiny, "--prompt", "On the", "--max-new-tokens", 6, "--temperature", 0)
    assert found["tokens"] == wanted
    assert found["tokens_per_second"] > 0


def test_the_seed_decides(packed):
    arguments = ("generate", packed, "--prompt", "On the", "--max-new-tokens", 12, "--temperature", 1.5)
    first = json_of(*arguments, "--seed", 3)["tokens"]
    assert json_of(*arguments, "--seed", 3)["tokens"] == first
    assert json_of(*arguments, "--seed", 4)["tokens"] != first


def test_the_cache_is_packed(tiny):
    arguments = ("generate", tiny, "--prompt", "On the", "--max-new-tokens", 20, "--temperature", 0)
    wanted, found = json_of(*arguments), json_of(*arguments, "--kv-cache", "uint8", "--kv-window", 4)
    assert found["tokens"][:8] == wanted["tokens"][:8]
    assert found["kv_cache"] == 'kv_cache(uint8(scale_dtype="float16"), per="token", window=4)'
    values, heads = 2 * 2 * 2 * 8, 2 * 2 * 2  # of a token, over layers, keys and values, and heads
    assert wanted["kv_cache_bytes"] == wanted["kv_cache_float_bytes"] == found["kv_cache_float_bytes"] == 32 * values * 4
    assert found["kv_cache_bytes"] == 32 * (values + 3 * heads) + 4 * values * 4 + 4 * heads


def test_keys_may_share_scales_along_time_and_numbers_may_be_fp8(tiny):
    arguments = ("generate", tiny, "--prompt", "On the", "--max-new-tokens", 20, "--temperature", 0)
    found = json_of(*arguments, "--kv-cache", "fp8_e4m3", "--kv-keys", "channel", "--kv-window", 0)
    assert found["tokens"][:4] == json_of(*arguments)["tokens"][:4]
    assert found["kv_cache"] == 'kv_cache(fp8_e4m3(scale_dtype="float16"), per="token", window=0)'
    assert found["kv_keys"] == 'kv_cache(fp8_e4m3(scale_dtype="float16"), per="channel", window=0)'
    half = 2 * 2 * 8  # keys or values of a token, over layers and heads
    assert found["kv_cache_bytes"] == 2 * 32 * half + 32 * 4 * 2 + (half * 2 + 31 * half * 4) + 2 * 4 * 4


@pytest.mark.slow
def test_the_cache_of_a_packed_model_is_packed(packed):
    result = invoke("generate", packed, "--prompt", "On the", "--max-new-tokens", 3, "--kv-cache", "int4", "--kv-window", 4)
    assert result.exit_code == 0
    assert ", cache of " in result.stderr and "in float)" in result.stderr and "larger" not in result.stderr
    result = invoke("generate", packed, "--prompt", "On the", "--max-new-tokens", 3, "--kv-cache", "int8", "--kv-window", 31)
    assert "larger than in float: a smaller --kv-window leaves fewer tokens float" in result.stderr


def test_the_text_streams_to_stdout_and_the_speed_to_stderr(packed):
    arguments = ("generate", packed, "--prompt", "On the", "--max-new-tokens", 10)
    result, found = invoke(*arguments), json_of(*arguments)
    assert result.exit_code == 0
    assert result.stdout == f"On the{found['text']}\n"
    assert result.stderr.startswith(f"{len(found['tokens'])} tokens, ")


def test_bytes_of_one_character_come_together():
    tokenizer = byte_tokenizer()
    prompt, new = tokenizer.encode("né").ids, tokenizer.encode("e→x").ids
    stream = Stream(tokenizer, prompt)
    assert [stream.push(token) for token in new] == ["e", "", "", "→", "x"]
    assert stream.end() == ""


def test_an_unfinished_character_comes_at_the_end():
    tokenizer = byte_tokenizer()
    stream = Stream(tokenizer, tokenizer.encode("a").ids)
    assert stream.push(tokenizer.encode("→").ids[0]) == ""
    assert stream.end() == "\ufffd"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, ["--prompt"]),
        (["--prompt", "On", "--max-new-tokens", "30"], 2, ["--max-new-tokens 30", "32", "at most 29"]),
        (["--prompt", "On", "--max-new-tokens", "0"], 2, ["--max-new-tokens"]),
        (["--prompt", "On", "--temperature", "-1"], 2, ["--temperature", "-1"]),
        (["--prompt", "On", "--temperature", "inf", "--max-new-tokens", "2"], 1, ["temperature", "inf"]),
        (["--prompt", "On", "--top-k", "0"], 2, ["--top-k"]),
        (["--prompt", "On", "--kv-keys", "channel"], 2, ["--kv-keys channel", "--kv-cache"]),
        (["--prompt", "On", "--kv-cache", "int9"], 2, ["--kv-cache", "int9"]),
        (["--prompt", "On", "--max-new-tokens", "2", "--kv-cache", "int8"], 1, ["32 tokens", "--kv-window", "--kv-cache"]),
    ],
)
def test_bad_input(tiny, options, code, words):
    result = invoke("generate", tiny, *options)
    line = error_of("generate", tiny, *options, "--json", code=code)
    assert result.stderr.splitlines()[-1] == line.rstrip("\n")
    for word in words:
        assert word in line, line


def test_several_prompts_are_continued_as_each_alone(packed):
    arguments = ("generate", packed, "--max-new-tokens", 5, "--temperature", 0)
    both = json_of(*arguments, "--prompt", "On the", "--prompt", "A bottle")
    alone = [json_of(*arguments, "--prompt", prompt) for prompt in both["prompts"]]
    assert both["tokens"] == [one["tokens"] for one in alone] and both["texts"] == [one["text"] for one in alone]
    assert both["parameter_bytes"] > 0 and both["peak_memory_bytes"] > both["parameter_bytes"]
    shown = invoke(*arguments, "--prompt", "On the", "--prompt", "A bottle").stdout
    assert shown == f"On the{both['texts'][0]}\n\nA bottle{both['texts'][1]}\n"


def test_a_draft_changes_no_token(tiny, packed):
    arguments = ("generate", tiny, "--prompt", "On the", "--max-new-tokens", 8, "--temperature", 0)
    wanted, found = json_of(*arguments), json_of(*arguments, "--draft", packed, "--draft-tokens", 2)
    assert found["tokens"] == wanted["tokens"] and found["draft"] == str(packed) and 0 <= found["acceptance"] <= 1
    result = invoke(*arguments, "--draft", packed, "--draft-tokens", 2)
    assert result.stdout == f"On the{wanted['text']}\n" and "of the draft's tokens accepted" in result.stderr
    assert "--kv-cache with --draft" in error_of(*arguments, "--draft", packed, "--kv-cache", "int8", code=2)
    assert "vocabulary of 4096" in error_of(*arguments, "--draft", "books-llama-4m", code=2)


def test_a_stop_text_ends_the_text_in_front_of_it(tiny):
    arguments = ("generate", tiny, "--prompt", "On the", "--max-new-tokens", 12, "--temperature", 0)
    whole = json_of(*arguments)
    stop = whole["text"][3:5]
    cut = json_of(*arguments, "--stop", stop)
    assert cut["text"] == whole["text"][: whole["text"].find(stop)] and len(cut["tokens"]) < len(whole["tokens"])
    assert invoke(*arguments, "--stop", stop).stdout == f"On the{cut['text']}\n"


def test_a_stop_text_is_not_shown_before_it_is_sure():
    tokenizer = byte_tokenizer()
    stream = Stream(tokenizer, tokenizer.encode("a").ids, ("xyz",))
    assert [stream.push(token) for token in tokenizer.encode("bxyxyzq").ids] == ["b", "", "", "xy", "", "", ""]
    assert stream.stopped and stream.end() == ""


def test_a_kernel_is_for_packed_models(tiny, packed):
    arguments = ("--prompt", "On", "--max-new-tokens", 2, "--json", "--kernel")
    assert "--kernel" in error_of("generate", tiny, *arguments, "cpu int8", code=2)
    assert "'cpu int8' cannot run" in error_of("generate", packed, *arguments, "cpu int8", code=1)
    assert json_of("generate", packed, "--prompt", "On", "--kernel", "xla", "--max-new-tokens", 2)["text"] is not None
