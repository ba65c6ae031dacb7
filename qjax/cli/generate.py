"""`qjax generate`: continues a text."""

import time
from typing import Any

import click

from qjax.cli.shared import SHIPPED, check_tokenizer, emit, json_option, open_model, platform

CACHES = [*(f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)), "fp8_e4m3"]


@click.command("generate")
@click.argument("model", default=SHIPPED)
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens at most.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=click.IntRange(min=1), default=40, show_default=True, help="Among the likeliest K; 1 is greedy too.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="The same seed gives the same text.")
@click.option("--kv-cache", type=click.Choice(CACHES), metavar="SPEC",
              help="Pack the keys and values of past tokens, a scale a token: int2 .. int8, uint2 .. uint8, fp8_e4m3.  [default: float]")
@click.option("--kv-keys", type=click.Choice(["token", "channel"]), default="token", show_default=True,
              help="--kv-cache: whether a scale of keys is that of a token, or of a channel over 32 tokens.")
@click.option("--kv-window", type=click.IntRange(min=0), default=32, show_default=True,
              help="--kv-cache: how many of the latest tokens stay float.")
@json_option
def command(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    kv_cache: str | None,
    kv_keys: str,
    kv_window: int,
    as_json: bool,
) -> None:
    """Continues a text with MODEL (default: books-llama-4m), float or packed."""
    import jax

    from qjax.cli.measure import cache_length, cache_of, run
    from qjax.evaluation import encode, tree_bytes

    started = time.perf_counter()
    policy, keys, values = _cache_policy(kv_cache, kv_keys, kv_window)
    opened = open_model(model)
    check_tokenizer(opened)
    ids = [*opened.start_ids, *encode(opened.tokenizer, prompt).tolist()]
    if not ids:
        raise click.UsageError(f"--prompt {prompt!r} holds no token: give some text")
    _check_length(opened, len(ids), max_new_tokens)
    length = cache_length(opened, len(ids) + max_new_tokens)
    memory, unpacked = (tree_bytes(jax.eval_shape(lambda p=p: cache_of(opened, length, p))) for p in (policy, None))
    stream = Stream(opened.tokenizer, ids)
    if not as_json:
        click.echo(prompt, nl=False)
    made = run(
        opened,
        ids,
        max_new_tokens,
        temperature=temperature,
        top_k=min(top_k, opened.config.vocab_size),
        key=jax.random.key(seed),
        kv_cache=policy,
        eos_ids=opened.config.eos_token_ids,
        on_token=None if as_json else lambda tokens: click.echo(stream.push(int(tokens[0])), nl=False),
    )
    new = made.tokens[0, len(ids) :].tolist()
    document = {
        "model": opened.name,
        "prompt": prompt,
        "text": opened.tokenizer.decode([*ids, *new])[len(opened.tokenizer.decode(ids)) :],
        "tokens": new,
        "tokens_per_second": made.tokens_per_second,
        "first_token_seconds": made.first_token_seconds,
        "seed": seed,
        "kv_cache": values,
        "kv_keys": keys,
        "kv_cache_bytes": memory,
        "kv_cache_float_bytes": unpacked,
        "platform": platform(),
        "seconds": round(time.perf_counter() - started, 3),
    }
    if as_json:
        emit(document)
    else:
        click.echo(stream.end())
        _speed(document)


def _check_length(model: Any, prompt: int, new: int) -> None:
    context = model.config.max_position_embeddings
    if prompt + new > context:
        raise click.UsageError(f"--max-new-tokens {new} after a prompt of {prompt} tokens exceeds the context of {model.name!r}, "
                               f"{context}: give at most {max(context - prompt, 0)}, or a shorter prompt")  # fmt: skip


def _cache_policy(name: str | None, per: Any, window: int) -> tuple[Any, str | None, str | None]:
    """The policy of the caches, and what it makes of keys and of values."""
    import qjax

    if name is None:
        if per != "token":
            raise click.UsageError(f"--kv-keys {per} is for a packed cache: give --kv-cache, too")
        return None, None, None
    spec = getattr(qjax, name)(scale_dtype="float16")
    keys, values = qjax.kv_cache(spec, per, window=window), qjax.kv_cache(spec, window=window)
    return qjax.Policy([qjax.Rule("2/*/key", cache=keys), qjax.Rule("2/*", cache=values)]), str(keys), str(values)


def _speed(document: dict[str, Any]) -> None:
    rate = document["tokens_per_second"]
    speed = "" if rate is None else f", {rate:.0f} a second once compiled"
    from qjax.report import format_bytes

    memory, unpacked = document["kv_cache_bytes"], document["kv_cache_float_bytes"]
    cache = "" if document["kv_cache"] is None else f", cache of {format_bytes(memory)} ({format_bytes(unpacked)} in float)"
    if memory > unpacked:
        cache += ", larger than in float: a smaller --kv-window leaves fewer tokens float"
    click.echo(f"{len(document['tokens'])} tokens{speed}{cache} ({document['platform']})", err=True)


class Stream:
    """Turns tokens into text as they come; bytes of an unfinished character wait for the rest."""

    def __init__(self, tokenizer: Any, ids: list[int]):
        self.tokenizer, self.ids = tokenizer, list(ids)
        self.shown = len(tokenizer.decode(self.ids))

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is certain now."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd"):
            return ""
        new, self.shown = text[self.shown :], len(text)
        return new

    def end(self) -> str:
        """Returns what is left."""
        return self.tokenizer.decode(self.ids)[self.shown :]
