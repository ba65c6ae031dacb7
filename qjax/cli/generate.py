"""`qjax generate`: continues a text."""

import time
from typing import Any

import click

from qjax.cli.shared import SHIPPED, check_tokenizer, emit, json_option, open_model, platform

CACHES = [*(f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)), "fp8_e4m3"]


@click.command("generate")
@click.argument("model", default=SHIPPED)
@click.option("--prompt", "prompts", multiple=True, required=True, help="The text to continue; several run side by side.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens at most.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=click.IntRange(min=1), default=40, show_default=True, help="Among the likeliest K; 1 is greedy too.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True),
              help="And among the fewest likeliest of this probability.  [default: all]")
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End in front of this text; may be given several times.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="The same seed gives the same text.")
@click.option("--kernel", metavar="NAME", help="The only kernel that may run products of packed weights, or xla.  [default: the fastest]")
@click.option("--kv-cache", type=click.Choice(CACHES), metavar="SPEC",
              help="Pack the keys and values of past tokens, a scale a token: int2 .. int8, uint2 .. uint8, fp8_e4m3.  [default: float]")
@click.option("--kv-keys", type=click.Choice(["token", "channel"]), default="token", show_default=True,
              help="--kv-cache: whether a scale of keys is that of a token, or of a channel over 32 tokens.")
@click.option("--kv-window", type=click.IntRange(min=0), default=32, show_default=True,
              help="--kv-cache: how many of the latest tokens stay float.")
@click.option("--draft", "draft_name", metavar="MODEL",
              help="A faster model of the same tokens, such as MODEL packed: it proposes, MODEL checks. The text is MODEL's own.")
@click.option("--draft-tokens", type=click.IntRange(min=1), default=4, show_default=True, help="--draft: tokens that a step proposes.")
@json_option
def command(
    model: str,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float | None,
    stops: tuple[str, ...],
    seed: int,
    kernel: str | None,
    kv_cache: str | None,
    kv_keys: str,
    kv_window: int,
    draft_name: str | None,
    draft_tokens: int,
    as_json: bool,
) -> None:
    """Continues texts with MODEL (default: books-llama-4m), float or packed."""
    import jax

    from qjax.cli.measure import cache_length, cache_of, run, run_drafted
    from qjax.evaluation import encode, tree_bytes

    started = time.perf_counter()
    policy, keys, values = _cache_policy(kv_cache, kv_keys, kv_window)
    if "" in stops:
        raise click.UsageError("--stop '' is in every text: give some text")
    opened = open_model(model)
    check_tokenizer(opened)
    rows = [[*opened.start_ids, *encode(opened.tokenizer, prompt).tolist()] for prompt in prompts]
    for prompt, ids in zip(prompts, rows, strict=True):
        if not ids:
            raise click.UsageError(f"--prompt {prompt!r} holds no token: give some text")
    longest = max(map(len, rows))
    _check_length(opened, longest, max_new_tokens)
    opened, draft = _laid_out(opened, kernel), _opened_draft(opened, draft_name, longest, max_new_tokens, kv_cache)
    length = cache_length(opened, longest + max_new_tokens)
    memory, unpacked = (tree_bytes(jax.eval_shape(lambda p=p: cache_of(opened, length, p, len(rows)))) for p in (policy, None))
    streams = [Stream(opened.tokenizer, ids, stops) for ids in rows]
    alone = len(rows) == 1 and not as_json
    if alone:
        click.echo(prompts[0], nl=False)
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": min(top_k, opened.config.vocab_size),
        "top_p": top_p,
        "key": jax.random.key(seed),
        "eos_ids": opened.config.eos_token_ids,
        "on_token": _listener(streams[0] if alone else None, streams, stops, [len(ids) - min(map(len, rows)) for ids in rows]),
    }
    if draft is None:
        made = run(opened, rows, max_new_tokens, kv_cache=policy, **options)
    else:
        made = run_drafted(opened, draft, rows, max_new_tokens, draft_tokens, **options)
    new = [row.tolist() for row in made.new]
    texts = [_text(opened.tokenizer, ids, tokens, stops) for ids, tokens in zip(rows, new, strict=True)]
    several = {"prompts": list(prompts), "texts": texts, "tokens": new}
    document = {
        "model": opened.name,
        **({"prompt": prompts[0], "text": texts[0], "tokens": new[0]} if len(rows) == 1 else several),
        "tokens_per_second": made.tokens_per_second,
        "first_token_seconds": made.first_token_seconds,
        "seed": seed,
        **({} if draft is None else {"draft": draft.name, "draft_tokens": draft_tokens, "acceptance": made.acceptance}),
        "kv_cache": values,
        "kv_keys": keys,
        "kv_cache_bytes": memory,
        "kv_cache_float_bytes": unpacked,
        "parameter_bytes": tree_bytes(opened.params),
        "peak_memory_bytes": _peak(),
        "platform": platform(),
        "seconds": round(time.perf_counter() - started, 3),
    }
    if as_json:
        emit(document)
        return
    if alone:
        click.echo(streams[0].end())
    else:
        click.echo("\n\n".join(prompt + text for prompt, text in zip(prompts, texts, strict=True)))
    _speed(document, sum(map(len, new)))


def _laid_out(opened: Any, kernel: str | None) -> Any:
    """A packed model with its weights as the kernels read them."""
    from qjax.cli.measure import laid_out

    if opened.document is None and kernel not in (None, "xla"):
        raise click.UsageError(f"--kernel {kernel} is for packed weights, and {opened.name!r} is float: quantize it")
    if kernel is not None and opened.document is not None and opened.document.sites:
        raise click.UsageError(f"--kernel {kernel}: {opened.name!r} has products of two activations, which have their own")
    return laid_out(opened, kernel, donate=True)


def _opened_draft(model: Any, name: str | None, prompt: int, new: int, kv_cache: str | None) -> Any:
    """The draft, laid out; None without one."""
    from qjax.cli.measure import laid_out

    if name is None:
        return None
    if kv_cache is not None:
        raise click.UsageError("--kv-cache with --draft: a packed cache keeps what it takes back only rounded; leave one of them away")
    draft = open_model(name)
    if draft.config.vocab_size != model.config.vocab_size:
        raise click.UsageError(f"--draft {name!r} has a vocabulary of {draft.config.vocab_size}, and {model.name!r} one of "
                               f"{model.config.vocab_size}: a draft must have the model's tokens")  # fmt: skip
    _check_length(draft, prompt, new)
    return laid_out(draft, donate=True)


def _listener(shown: Any, streams: list["Stream"], stops: tuple[str, ...], wait: list[int]) -> Any:
    """What is called with each new tokens: shows those of one stream, and says when all have come to a stop."""
    if shown is None and not stops:
        return None
    left = list(wait)  # tokens of a longer prompt that still come

    def listen(tokens: Any) -> bool:
        for i, (stream, token) in enumerate(zip(streams, tokens, strict=True)):
            if left[i] > 0:
                left[i] -= 1
                continue
            text = stream.push(int(token))
            if stream is shown:
                click.echo(text, nl=False)
        return bool(stops) and all(stream.stopped for stream in streams)

    return listen


def _text(tokenizer: Any, ids: list[int], new: list[int], stops: tuple[str, ...]) -> str:
    text = tokenizer.decode([*ids, *new])[len(tokenizer.decode(ids)) :]
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _peak() -> int | None:
    from qjax.evaluation.memory import peak_resident_bytes

    try:
        return peak_resident_bytes()
    except OSError:  # this system does not say
        return None


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


def _speed(document: dict[str, Any], count: int) -> None:
    from qjax.report import format_bytes

    rate = document["tokens_per_second"]
    speed = "" if rate is None else f", {rate:.0f} a second once compiled"
    packed, unpacked = document["kv_cache_bytes"], document["kv_cache_float_bytes"]
    cache = "" if document["kv_cache"] is None else f", cache of {format_bytes(packed)} ({format_bytes(unpacked)} in float)"
    if packed > unpacked:
        cache += ", larger than in float: a smaller --kv-window leaves fewer tokens float"
    peak = document["peak_memory_bytes"]
    share = document.get("acceptance")
    speed += "" if share is None else f", {share:.0%} of the draft's tokens accepted"
    memory = f", parameters {format_bytes(document['parameter_bytes'])}"
    memory += "" if peak is None else f", process at most {format_bytes(peak)}"
    click.echo(f"{count} tokens{speed}{cache}{memory} ({document['platform']})", err=True)


class Stream:
    """Turns tokens into text as they come; bytes of an unfinished character, and what may begin a stop text, wait for the rest."""

    def __init__(self, tokenizer: Any, ids: list[int], stops: tuple[str, ...] = ()):
        self.tokenizer, self.ids, self.stops = tokenizer, list(ids), stops
        self.begin = self.shown = len(tokenizer.decode(self.ids))
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is certain now."""
        if self.stopped:
            return ""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd"):
            return ""
        certain = self._cut(text)
        if not self.stopped:
            certain -= max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        new = text[self.shown : certain]
        self.shown = max(self.shown, certain)
        return new

    def end(self) -> str:
        """Returns what is left."""
        text = self.tokenizer.decode(self.ids)
        return text[self.shown : self._cut(text)]

    def _cut(self, text: str) -> int:
        """Where the text ends: in front of the first stop."""
        found = [at for stop in self.stops if (at := text.find(stop, self.begin)) >= 0]
        self.stopped = bool(found)
        return min(found, default=len(text))
