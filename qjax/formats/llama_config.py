"""What the `config.json` of a Llama-shaped checkpoint says, checked and frozen.

It lives with the formats, below `qjax.models`, because the reader needs it to know which tensors a file must hold.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
_LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of Llama 3.1 ("llama3"): long wavelengths are slowed by `factor`, short ones kept.

    Attributes:
      factor: division of the slow frequencies.
      low_freq_factor: wavelengths above original / low_freq_factor are divided in full.
      high_freq_factor: wavelengths below original / high_freq_factor are kept.
      original_max_position_embeddings: the context length before scaling, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a Llama, under the names of Hugging Face's `config.json`.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width D.
      intermediate_size: width of the feed-forward part.
      num_hidden_layers: L.
      num_attention_heads: query heads.
      num_key_value_heads: key and value heads; divides `num_attention_heads`.
      head_dim: width of one head, even.
      max_position_embeddings: context length, in tokens.
      rms_norm_eps: added to the mean square.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None or the scaling of Llama 3.1.
      tie_word_embeddings: whether the head is the embedding.
      attention_bias: whether q, k, v and o have a bias.
      mlp_bias: whether gate, up and down have a bias.
      bos_token_id: the token put before a text, if any.
      eos_token_ids: tokens that end a text.

    Raises:
      ValueError: a value is out of range, or two values do not fit.

    Example:
      >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
      ...                      num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=16)
      >>> config.num_attention_heads // config.num_key_value_heads
      2
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuses values that no Llama can have."""
        for name in _SIZES:
            _positive_int(name, getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta"):
            _positive_float(name, getattr(self, name))
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be true or false, not {getattr(self, name)!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"{self.num_attention_heads} by {self.num_key_value_heads}"
            raise ValueError(
                f"`num_key_value_heads` must divide `num_attention_heads`, not {heads}: correct the config"
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even for rotary positions, not {self.head_dim}: correct the config")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the values of a `config.json`.

        Args:
          values: the parsed JSON object. Both spellings of rotary settings are read: `rope_theta` with `rope_scaling`
            (transformers 4) and `rope_parameters` (transformers 5).

        Returns:
          The config.

        Raises:
          ValueError: a value is missing, out of range, or asks for something this model does not do.

        Source: transformers `LlamaConfig` and `MistralConfig`, whose defaults are used for what a file leaves out.
        """
        model_kind(values)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            if name not in values:
                raise ValueError(f"`{name}` is missing from config.json: add it, or download the config again")
            _positive_int(name, values[name])
        heads = values["num_attention_heads"]
        kv_heads = _given(values, "num_key_value_heads", heads)
        theta, scaling = _rope(values)
        return cls(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_hidden_layers=values["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=_given(values, "head_dim", values["hidden_size"] // heads),
            max_position_embeddings=_given(values, "max_position_embeddings", 2048),
            rms_norm_eps=_given(values, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_given(values, "tie_word_embeddings", False),
            attention_bias=_given(values, "attention_bias", False),
            mlp_bias=_given(values, "mlp_bias", False),
            bos_token_id=next(iter(_token_ids(values, "bos_token_id")), None),
            eos_token_ids=_token_ids(values, "eos_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """Gives the values as a `config.json` of a LlamaForCausalLM; `from_hf` reads it back equal."""
        scaling = self.rope_scaling
        llama3 = {"rope_type": "llama3"} | {f: getattr(scaling, f) for f in _LLAMA3_FIELDS} if scaling else None
        plain = {name: getattr(self, name) for name in (*_SIZES, "rms_norm_eps", "rope_theta", "bos_token_id")}
        flags = {name: getattr(self, name) for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")}
        eos = self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None
        rest = {"rope_scaling": llama3, "hidden_act": "silu", "eos_token_id": eos}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **plain, **flags, **rest}


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def model_kind(values: Mapping[str, Any]) -> str:
    """Tells the family of a checkpoint and refuses what this project would compute wrongly.

    Args:
      values: the parsed `config.json`.

    Returns:
      "llama" or "mistral".

    Raises:
      ValueError: another architecture, or an option that changes the mathematics and is not implemented.
    """
    architectures = values.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise ValueError(f"`architectures` is {architectures!r}, which is not supported: use a checkpoint of {known}")
    if values.get("quantization_config") is not None:
        raise ValueError("`quantization_config` is set: load the float checkpoint that this one was quantized from")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"`hidden_act` {values['hidden_act']!r} is not supported: use a checkpoint with silu")
    window, context = values.get("sliding_window"), _given(values, "max_position_embeddings", 2048)
    _positive_int("max_position_embeddings", context)
    if window is not None and not (isinstance(window, int) and window >= context):
        raise ValueError(f"`sliding_window` {window!r} is not supported: use a checkpoint where it is null")
    if _given(values, "partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"`partial_rotary_factor` {values['partial_rotary_factor']!r} is not supported: it must be 1.0"
        )
    return ARCHITECTURES[name]


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    newer, older = values.get("rope_parameters"), values.get("rope_scaling")
    settings = newer if newer is not None else older if older is not None else {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"`rope_scaling` must be an object or null, not {settings!r}: correct config.json")
    theta = settings.get("rope_theta", values.get("rope_theta", 10000.0))
    if values.get("rope_theta", theta) != theta:
        raise ValueError(
            f"`rope_theta` is given twice, {values['rope_theta']!r} and {theta!r}: keep one in config.json"
        )
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(
            f"`rope_scaling` of type {kind!r} is not supported: use a checkpoint with llama3 or no scaling"
        )
    for field in _LLAMA3_FIELDS:
        _positive_float(f"rope_scaling.{field}", settings.get(field))
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    if not low < high:
        raise ValueError(f"`rope_scaling.low_freq_factor` {low!r} must be below high_freq_factor {high!r}: correct it")
    original = settings["original_max_position_embeddings"]
    _positive_int("rope_scaling.original_max_position_embeddings", original)
    return theta, RopeScaling(float(settings["factor"]), float(low), float(high), original)


def _given(values: Mapping[str, Any], name: str, default: Any) -> Any:
    return default if values.get(name) is None else values[name]


def _token_ids(values: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = values.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ValueError(f"`{name}` must be a token id or a list of them, not {value!r}: correct config.json")
    return tuple(ids)


def _positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive whole number, not {value!r}: correct the config")


def _positive_float(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value < math.inf):
        raise ValueError(f"`{name}` must be a positive finite number, not {value!r}: correct the config")
