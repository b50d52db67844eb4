# SPDX-License-Identifier: Apache-2.0
"""Reads Hugging Face folders: config.json, safetensors files and tokenizer.json.

Weights are parsed by `safetensors`, which checks its header against the file; pickled weights
(.bin, .pt) are never read. Every setting of config.json is used, known to have no influence on the
logits, or refused by name where its value would change them; one that is in neither list is named
in a warning. What a file leaves out has the value that `transformers` gives it.
"""

import contextlib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch

from speq.model.checkpoint import (
    CheckpointError,
    ModelConfig,
    WeightReader,
    check_architecture,
    collect_weights,
    expect_all_read,
    expect_shape,
    places,
)
from speq.model.input_file import check_regular
from speq.model.loaders.header import (
    Header,
    StoredTensor,
    attempt,
    stored_problems,
    whole_numbers,
)
from speq.model.loaders.hf_tokenizer import read_tokenizer
from speq.model.loaders.json_file import read_json
from speq.model.tokenizer import Tokenizer

_TENSOR_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    **{f"{x}_proj": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"{x}_proj.bias": f"self_attn.{x}_proj.bias" for x in "qkvo"},
    **{f"{x}_proj": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    **{f"{x}_proj.bias": f"mlp.{x}_proj.bias" for x in ("gate", "up", "down")},
}
_DTYPES = ("F16", "BF16", "F32")
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden": "hidden_size",
    "ffn_hidden": "intermediate_size",
    "blocks": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "context": "max_position_embeddings",
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class _Family:
    """What an architecture's folders have of their own.

    Members: settings besides the common ones; what stands for settings that a file leaves out,
    where it differs from Llama's; layers that always have a bias; names of tensors that differ;
    what is added to the weights of norms.
    """

    settings: tuple[str, ...] = ()
    absent: Mapping[str, Any] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    head_norms: bool = False
    post_norms: bool = False
    tensors: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0


_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_BIASES = ("attention_bias", "mlp_bias")
_WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers")
_FAMILIES = {
    "llama": _Family(_BIASES),
    "mistral": _Family(("sliding_window",), {"num_key_value_heads": 8, "sliding_window": 4096}),
    "smollm3": _Family(
        (*_BIASES, *_WINDOWS[:2], "no_rope_layers", "no_rope_layer_interval"),
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6},
    ),
    "phi3": _Family(
        ("sliding_window",),
        {"rms_norm_eps": 1e-5},
        tensors={
            **{f"{x}_proj": "self_attn.qkv_proj.weight" for x in "qkv"},
            **{f"{x}_proj": "mlp.gate_up_proj.weight" for x in ("gate", "up")},
        },
    ),
    "granite": _Family(
        (
            *_BIASES,
            "embedding_multiplier",
            "residual_multiplier",
            "attention_multiplier",
            "logits_scaling",
        )
    ),
    "qwen2": _Family(
        _WINDOWS,
        {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
        biases=_ATTENTION[:3],
    ),
    "qwen3": _Family(
        ("attention_bias", *_WINDOWS),
        {
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        head_norms=True,
    ),
    "gemma3": _Family(
        (
            "attention_bias",
            "query_pre_attn_scalar",
            "sliding_window",
            "sliding_window_pattern",
            "_sliding_window_pattern",
            "rope_local_base_freq",
            "hidden_activation",
        ),
        {
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "sliding_window": 4096,
        },
        head_norms=True,
        post_norms=True,
        tensors={
            "post_attn_norm": "post_attention_layernorm.weight",
            "ffn_norm": "pre_feedforward_layernorm.weight",
            "post_ffn_norm": "post_feedforward_layernorm.weight",
        },
        norm_offset=1.0,  # Gemma stores a norm's factor minus one
    ),
}
# Settings that every architecture has and that are used below or with the tokenizer.
_USED = {
    "model_type",
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "layer_types",
    "eos_token_id",
}
# Settings that change the computation, with the values under which it is the one implemented here;
# null, which stands for an absent one, is always among them.
_NEUTRAL: dict[str, tuple] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "sliding_window": (),
    "sliding_window_pattern": (),
    "_sliding_window_pattern": (),
    "use_bidirectional_attention": (False,),
    "no_rope_layers": (),
    "partial_rotary_factor": (1.0,),
    "rope_local_base_freq": (),
    "rope_interleaved": (False,),
    "rope_interleave": (False,),
    "quantization_config": (),
    "compression_config": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "attention_multiplier": (),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
    "use_mrope": (False,),
    "clip_qkv": (),
    "attn_temperature_tuning": (False,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "hidden_activation": ("silu",),
    "position_embedding_type": ("rope",),
}
# Training, ids of tokens that only their own tasks use, defaults of sampling (the command line
# decides), forms of output and of storage, and who made the file.
_WITHOUT_INFLUENCE = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_from_model_config",
    "_name_or_path",
    "_pre_quantization_dtype",
    "attention_dropout",
    "auto_map",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "finetuning_task",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "max_length",
    "max_window_layers",
    "min_length",
    "no_rope_layer_interval",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "original_max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "pretraining_tp",
    "prefix",
    "problem_type",
    "resid_pdrop",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
}


def read_hf_config(path: Path) -> ModelConfig:
    """Configuration in a config.json. Raises CheckpointError."""
    return config_of(read_json(path))


def load_hf(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], Tokenizer]:
    """Configuration, FP16 weights and tokenizer of a folder. Raises CheckpointError."""
    settings = read_json(folder / "config.json")
    config = config_of(settings)
    with contextlib.ExitStack() as stack:
        config, weights = read_weights(config, _open(folder, stack))
    return config, weights, read_tokenizer(folder, settings)


def read_hf_header(folder: Path) -> Header:
    """What the headers of a folder's files say. Raises CheckpointError or OSError if config.json
    cannot be read; all else is among the problems."""
    values = read_json(folder / "config.json")
    problems = _problems(values)
    config = None if problems else config_of(values)
    tensors, size = {}, 0
    with contextlib.ExitStack() as stack:
        for name, file in (attempt(problems, _open, folder, stack, "pread") or {}).items():
            entry = file.get_slice(name)
            tensors[name] = StoredTensor(tuple(entry.get_shape()), entry.get_dtype())
    if tensors:
        size = sum(path.stat().st_size for path in _weight_files(folder)[0])
    if config and tensors:
        where = places(config, lambda name: stored_name(name, config.architecture))
        problems += stored_problems(where, tensors, _unused(tensors), _check_dtype)
    return Header(
        "Hugging Face folder",
        str(values.get("model_type")),
        config,
        problems,
        whole_numbers(values, _SIZES),
        tensors,
        size,
        attempt(problems, read_tokenizer, folder, values),
    )


def _problems(values: dict[str, Any]) -> list[str]:
    """What is not supported in config.json: the architecture, every setting that is refused by
    name, activation, RoPE, and the first of what else is wrong."""
    settings = _Settings(values)
    problems: list[str] = []
    architecture = attempt(problems, _architecture, settings)
    if architecture:
        family = _FAMILIES[architecture]
    else:  # what no architecture has
        family = _Family(tuple(key for each in _FAMILIES.values() for key in each.settings))
    refused = _refused(settings, family)
    problems += map(str, refused.values())
    attempt(problems, _check_class, settings)
    if architecture:
        without = {*refused, "architectures"}
        gemma = architecture == "gemma3"
        if attempt(problems, _activation, settings, gemma) is None:
            without |= {"hidden_act", "hidden_activation"}
        if attempt(problems, lambda: _rope_type(_rope_settings(settings, gemma)[0])) is None:
            without |= {"rope_scaling", "rope_parameters"}
        rest = {key: value for key, value in values.items() if key not in without}
        attempt(problems, _config, _Settings(rest))
    return problems


def config_of(values: dict[str, Any]) -> ModelConfig:
    """Configuration from the content of config.json. Raises CheckpointError."""
    return _config(_Settings(values))


def read_weights(
    config: ModelConfig, stores: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """FP16 weights, and the configuration with a head of its own if one is stored.

    `stores` are by name of tensor what has it: an open safetensors file, or what has its methods
    `get_slice` and `get_tensor`. Raises CheckpointError.
    """
    config = _with_stored_head(config, stores)
    return config, collect_weights(config, _weight_reader(stores, config))


@dataclass(frozen=True)
class _Settings:
    """Typed access to a JSON object; null is the same as absent."""

    values: dict[str, Any]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Value of `key`, an integer also where a number is wanted; required without a default."""
        value = self.optional(key, kind)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"setting {key!r} is missing")
        return value

    def optional(self, key: str, kind: type) -> Any:
        """Value of `key`, None if it is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) is int and abs(value) >= 1 << 53:
            raise CheckpointError(f"setting {key!r} is absurdly large")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(f"setting {key!r} has the wrong type")
        return value

    def one_of(self, kind: type, **spellings: Any) -> Any:
        """The value of a setting that has several spellings, None if all are absent. Refuses a
        contradiction."""
        given = {key: value for key, value in spellings.items() if value is not None}
        for key, value in given.items():
            if value != (first := next(iter(given.items())))[1]:
                raise CheckpointError(
                    f"settings contradict each other: {first[0]} = {first[1]!r:.40}, "
                    f"{key} = {value!r:.40}"
                )
        return next(iter(given.values()), None)


def _refuse(key: str, value: object, supported: Sequence[object] = ()) -> CheckpointError:
    expected = " or ".join(str(value) for value in supported) or "null"
    return CheckpointError(f"setting {key} = {value!r:.60} is not supported, only {expected}")


def _refused(settings: _Settings, family: _Family) -> dict[str, CheckpointError]:
    """The settings that would change the computation, and what is said of each."""
    return {
        key: _refuse(key, value, _NEUTRAL[key])
        for key, value in settings.values.items()
        if value is not None
        and key in _NEUTRAL
        and key not in family.settings
        and value not in _NEUTRAL[key]
    }


def _check_known(settings: _Settings, family: _Family) -> None:
    """Refuses settings that would change the computation, and warns about unknown ones."""
    for refusal in _refused(settings, family).values():
        raise refusal
    known = {*_USED, *family.settings, *_NEUTRAL, *_WITHOUT_INFLUENCE}
    unknown = [k for k, value in settings.values.items() if value is not None and k not in known]
    if unknown:
        names = ", ".join(f"{key!r:.60}" for key in unknown[:8])
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        warnings.warn(f"config.json: unknown settings are ignored: {names}{more}", stacklevel=2)


def _architecture(settings: _Settings) -> str:
    model_type = settings.get("model_type", str)
    if model_type == "gemma3":
        raise CheckpointError("multimodal 'gemma3' is not supported, only 'gemma3_text'")
    architecture = "gemma3" if model_type == "gemma3_text" else model_type
    check_architecture(architecture)
    return architecture


def _config(settings: _Settings) -> ModelConfig:
    architecture = _architecture(settings)
    family = _FAMILIES[architecture]
    _check_known(settings, family)
    _check_class(settings)
    # Of an absent setting, `transformers` takes another value than of null.
    absent = {key: value for key, value in family.absent.items() if key not in settings.values}
    settings = _Settings({**settings.values, **absent})
    get = settings.get
    gemma = architecture == "gemma3"
    hidden, heads, blocks = (
        get(key, int) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    if heads < 1:
        raise CheckpointError("num_attention_heads is not positive")
    head_dim = get("head_dim", int, hidden // heads)
    rope, local_rope = _rope_settings(settings, gemma)
    base = settings.one_of(
        float,
        rope_theta=None if "rope_theta" in absent else settings.optional("rope_theta", float),
        **{"rope_parameters.rope_theta": rope.optional("rope_theta", float)},
    )
    config = ModelConfig(
        architecture=architecture,
        vocab_size=get("vocab_size", int),
        hidden=hidden,
        ffn_hidden=get("intermediate_size", int),
        blocks=blocks,
        heads=heads,
        kv_heads=get("num_key_value_heads", int, heads),
        head_dim=head_dim,
        context=get("max_position_embeddings", int),
        norm_eps=get("rms_norm_eps", float, 1e-6),
        rope_base=base or absent.get("rope_theta", 1e4),
        attention_scale=_attention_scale(settings, architecture, head_dim),
        tied_head=get("tie_word_embeddings", bool, False),
        activation=_activation(settings, gemma),
        embedding_scale=(
            math.sqrt(max(hidden, 1)) if gemma else _multiplier(settings, "embedding_multiplier")
        ),
        residual_scale=_multiplier(settings, "residual_multiplier"),
        logit_scale=1.0 / _multiplier(settings, "logits_scaling"),
        biases=_biases(settings, family),
        head_norms=family.head_norms,
        post_norms=family.post_norms,
    )
    # Not before the constructor has checked head_dim, blocks and base.
    windowed = _windowed_blocks(settings, config)
    local_base = settings.one_of(
        float,
        rope_local_base_freq=settings.optional("rope_local_base_freq", float),
        **{"rope_parameters.rope_theta": local_rope.optional("rope_theta", float)},
    )
    return replace(
        config,
        rope_divisors=_rope_divisors(rope, config.rope_base, head_dim),
        sliding_window=get("sliding_window", int) if windowed else None,
        windowed=windowed,
        local_rope_base=(local_base or 1e4) if gemma else None,
        unrotated=_unrotated_blocks(settings, config),
    )


def _check_class(settings: _Settings) -> None:
    classes = settings.get("architectures", list, [])
    if classes and not any(str(name).endswith("ForCausalLM") for name in classes):
        raise _refuse("architectures", classes, ["a ...ForCausalLM"])


def _activation(settings: _Settings, gemma: bool) -> str:
    key = "hidden_activation" if gemma else "hidden_act"
    known = {"gelu_pytorch_tanh": "gelu_tanh"} if gemma else {"silu": "silu", "swish": "silu"}
    name = settings.get(key, str, next(iter(known)))
    if name not in known:
        raise _refuse(key, name, [*known])
    other = settings.values.get("hidden_act", name)
    if gemma and other not in (None, name):
        raise _refuse("hidden_act", other, [*known])
    return known[name]


def _multiplier(settings: _Settings, key: str) -> float:
    value = settings.get(key, float, 1.0)
    if not 0 < value < math.inf:
        raise CheckpointError(f"setting {key} = {value!r:.60} is not a positive number")
    return value


def _biases(settings: _Settings, family: _Family) -> tuple[str, ...]:
    attention = _ATTENTION if settings.get("attention_bias", bool, False) else family.biases
    return attention + (_MLP if settings.get("mlp_bias", bool, False) else ())


def _rope_settings(settings: _Settings, gemma: bool) -> tuple[_Settings, _Settings]:
    """RoPE settings of global and of sliding-window blocks; newer files of Gemma give both."""
    scaling, parameters = (
        _Settings(settings.get(key, dict, {})) for key in ("rope_scaling", "rope_parameters")
    )
    local = _Settings({})
    if "full_attention" in parameters.values:
        if not gemma:
            raise CheckpointError(
                "RoPE settings by type of attention are not supported, only for gemma3"
            )
        others = parameters.values.keys() - {"full_attention", "sliding_attention"}
        if others:
            raise CheckpointError(f"setting {min(others)} of rope_parameters is not supported")
        local = _Settings(parameters.get("sliding_attention", dict, {}))
        if _rope_type(local) != "default":
            raise CheckpointError("RoPE scaling of sliding-window blocks is not supported")
        parameters = _Settings(parameters.get("full_attention", dict))
    for key in scaling.values.keys() & parameters.values.keys():
        if scaling.values[key] != parameters.values[key]:
            raise CheckpointError(f"rope_scaling and rope_parameters contradict each other: {key}")
    return _Settings({**scaling.values, **parameters.values}), local


def _rope_type(rope: _Settings) -> str:
    """The kind of scaling, of whose settings none may be unknown."""
    kind = rope.one_of(
        str, rope_type=rope.optional("rope_type", str), type=rope.optional("type", str)
    )
    kind = kind or "default"
    known = {"rope_type", "type", "rope_theta"}
    if kind in ("linear", "llama3"):
        known |= {"factor", "original_max_position_embeddings"}
    elif kind != "default":
        raise CheckpointError(
            f"RoPE scaling {kind!r:.40} is not supported, only default, linear and llama3"
        )
    if kind == "llama3":
        known |= {"low_freq_factor", "high_freq_factor"}
    for key, value in rope.values.items():
        neutral = (None, 1.0) if key in ("partial_rotary_factor", "factor") else (None,)
        if key not in known and value not in neutral:
            raise CheckpointError(
                f"setting {key} = {value!r:.60} of RoPE scaling {kind!r} is not supported"
            )
    return kind


def _rope_divisors(rope: _Settings, base: float, head_dim: int) -> tuple[float, ...] | None:
    """What divides the rotary frequencies: nothing, one factor ("linear"), or Llama 3's rule."""
    kind = _rope_type(rope)
    if kind == "default":
        return None
    if kind == "linear":
        return (rope.get("factor", float),) * (head_dim // 2)
    factor = rope.get("factor", float)
    low = rope.get("low_freq_factor", float)
    high = rope.get("high_freq_factor", float)
    trained = rope.get("original_max_position_embeddings", float)
    if not (factor >= 1 and 0 < low < high and trained > 0):
        raise CheckpointError("RoPE scaling 'llama3' has impossible factors")
    divisors = []
    for i in range(head_dim // 2):
        # Turns that the pair makes within the original context: few are slowed down, many are not.
        turns = trained / (2 * math.pi * base ** (2 * i / head_dim))
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1.0 / (kept + (1.0 - kept) / factor))
    return tuple(divisors)


def _attention_scale(settings: _Settings, architecture: str, head_dim: int) -> float:
    if architecture == "granite":
        return _multiplier(settings, "attention_multiplier")
    scalar = float(head_dim)
    if architecture == "gemma3":
        scalar = settings.get("query_pre_attn_scalar", float, 256.0)
    if scalar <= 0:
        raise CheckpointError("the attention scale is not positive")
    return scalar**-0.5


def _windowed_blocks(settings: _Settings, config: ModelConfig) -> tuple[int, ...]:
    """The blocks whose attention has a sliding window: by the list of their types if there is one,
    otherwise by the architecture's pattern."""
    blocks = range(config.blocks)
    windowed = settings.optional("sliding_window", int) is not None
    if config.architecture in ("smollm3", "qwen2", "qwen3"):
        windowed = windowed and settings.get("use_sliding_window", bool, False)
    expected = [*blocks] if windowed else []
    if windowed and config.architecture in ("qwen2", "qwen3"):
        expected = [i for i in blocks if i >= settings.get("max_window_layers", int)]
    elif windowed and config.architecture == "smollm3":
        expected = list(_unrotated_blocks(settings, config))
    if config.architecture == "gemma3":
        keys = ("sliding_window_pattern", "_sliding_window_pattern")
        pattern = settings.one_of(int, **{key: settings.optional(key, int) for key in keys})
        if pattern is not None and pattern < 1:
            raise CheckpointError("sliding_window_pattern is not positive")
        expected = [i for i in blocks if windowed and (i + 1) % (pattern or 6)]
    kinds = settings.optional("layer_types", list)
    if kinds is None:
        return tuple(expected)
    if len(kinds) != config.blocks:
        raise CheckpointError(f"layer_types has {len(kinds)} entries for {config.blocks} blocks")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise _refuse("layer_types", kind, ["full_attention", "sliding_attention"])
    listed = [i for i in blocks if kinds[i] == "sliding_attention"]
    # The patterns are defaults of `transformers`, which it stores beside a list that differs.
    free = config.architecture in ("gemma3", "qwen2", "qwen3", "smollm3")
    if listed != expected and (not free or (listed and not windowed)):
        raise CheckpointError("layer_types contradicts the other settings of sliding windows")
    return tuple(listed)


def _unrotated_blocks(settings: _Settings, config: ModelConfig) -> tuple[int, ...]:
    """The blocks without rotary embedding (SmolLM3): by the list, 1 for a block that rotates,
    otherwise at the interval, a default that `transformers` stores beside lists, too."""
    if config.architecture != "smollm3":
        return ()
    interval = settings.optional("no_rope_layer_interval", int)
    flags = settings.optional("no_rope_layers", list)
    if interval is not None and interval < 1:
        raise CheckpointError("no_rope_layer_interval is not positive")
    regular = [int((i + 1) % (interval or 4) != 0) for i in range(config.blocks)]
    if flags is None:
        flags = regular
    if len(flags) != config.blocks or any(flag not in (0, 1) for flag in flags):
        raise CheckpointError(f"no_rope_layers is not a list of {config.blocks} times 0 or 1")
    return tuple(i for i, flag in enumerate(flags) if not flag)


def stored_name(name: str, architecture: str) -> str:
    """The file's name of a weight."""
    names = _TENSOR_NAMES | dict(_FAMILIES[architecture].tensors)
    if name.startswith("block."):
        _, block, part = name.split(".", 2)
        return f"model.layers.{block}.{names[part]}"
    return names[name]


_Files = dict[str, Any]  # the open safetensors file of each tensor


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The folder's files with weights, and from its index the file of each tensor, if it has one.

    As in `transformers`, model.safetensors stands alone; otherwise the index, or what is numbered
    model-00001-of-00003.safetensors, names the parts.
    """
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    shards = [name for name in found if _SHARD.fullmatch(name)]
    index = folder / _INDEX
    if _SINGLE in found:
        if shards or index.exists():
            other = shards[0] if shards else _INDEX
            raise CheckpointError(
                f"there are both {_SINGLE} and {other}: remove those that do not belong to the "
                "model"
            )
        variants = [name for name in found if re.fullmatch(r"model\..+\.safetensors", name)]
        if variants:
            warnings.warn(f"{variants[0]} is ignored, {_SINGLE} is the model", stacklevel=2)
        return [folder / _SINGLE], {}
    if index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise CheckpointError(f"{_INDEX} has no weight_map from tensors to files")
        for name in table.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{_INDEX} names {name!r:.80}, which is no file beside it")
            if name not in found:
                raise CheckpointError(f"{_INDEX} names {name!r:.80}, which is missing")
        return [folder / name for name in sorted({*table.values()})], table
    if not shards:
        hint = f"; rename {found[0]} if it is the whole model" if found else ""
        raise CheckpointError(f"no {_SINGLE} with weights (pickled weights are not read){hint}")
    expected = int(shards[0][-len("00001.safetensors") :][:5])
    numbered = [f"model-{i + 1:05}-of-{expected:05}.safetensors" for i in range(len(shards))]
    if shards != numbered or len(shards) != expected:
        missing = next((name for name in numbered if name not in shards), f"{len(shards)} found")
        raise CheckpointError(
            f"of the {expected} files model-...-of-{expected:05}.safetensors some are missing or "
            f"others lie beside them ({missing})"
        )
    return [folder / name for name in shards], {}


def _open(folder: Path, stack: contextlib.ExitStack, backend: str = "mmap") -> _Files:
    """Opens the folder's safetensors files, with "pread" also those that are larger than what may
    be mapped with write access."""
    files: _Files = {}
    paths, index = _weight_files(folder)
    for path in paths:
        check_regular(path)
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="pt", backend=backend))
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path.name}: {error}") from error
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if name in files:
                raise CheckpointError(f"tensor {name!r:.80} is in two files")
            if index and index.get(name) != path.name:
                raise CheckpointError(f"{_INDEX} has tensor {name!r:.80} in another file")
            files[name] = file
    for name in index:
        if name not in files:
            raise CheckpointError(f"{_INDEX} has tensor {name!r:.80}, which no file has")
    return files


def _with_stored_head(config: ModelConfig, files: Mapping[str, Any]) -> ModelConfig:
    """The configuration with its own head if the file has one that differs from the embedding,
    whatever it says about them: as in `transformers`, what is stored is the model's."""
    head, embedding = (stored_name(name, config.architecture) for name in ("head", "embedding"))
    if not config.tied_head or head not in files or embedding not in files:
        return config
    stored = [files[name].get_slice(name) for name in (head, embedding)]
    alike = stored[0].get_shape() == stored[1].get_shape() and torch.equal(
        files[head].get_tensor(head), files[embedding].get_tensor(embedding)
    )
    return config if alike else replace(config, tied_head=False)


def _unused(names: Iterable[str]) -> list[str]:
    """The tensors that a model may do without: old files store the rotary frequencies, tied models
    sometimes the head once more."""
    return [*(n for n in names if n.endswith("rotary_emb.inv_freq")), _TENSOR_NAMES["head"]]


def _check_dtype(name: str, kind: str) -> None:
    if kind not in _DTYPES:
        raise CheckpointError(f"tensor {name!r} is {kind}, only {', '.join(_DTYPES)} are supported")


def _weight_reader(files: Mapping[str, Any], config: ModelConfig) -> WeightReader:
    """The function that reads a weight from the open files."""
    family = _FAMILIES[config.architecture]
    where = places(config, lambda name: stored_name(name, config.architecture))
    expect_all_read(files, [*(place.tensor for place in where.values()), *_unused(files)])

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        place = where[name]
        if place.tensor not in files:
            raise CheckpointError(f"tensor {place.tensor!r} is missing")
        entry = files[place.tensor].get_slice(place.tensor)
        _check_dtype(place.tensor, entry.get_dtype())
        expect_shape(place.tensor, tuple(entry.get_shape()), place.shape)
        weight = entry[place.rows]
        if family.norm_offset and name.endswith("norm"):
            return weight.to(torch.float32) + family.norm_offset
        return weight

    return read
