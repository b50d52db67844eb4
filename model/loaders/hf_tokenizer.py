# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a Hugging Face folder: tokenizer.json and the settings beside it.

tokenizer.json says how text becomes tokens. The other files say what transformers 5 adds to it:
tokenizer_config.json further special tokens, beginning of text and the chat template, which may
also be chat_template.jinja; generation_config.json what ends a reply.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from speq.model.chat import END_OF_TEXT, END_OF_TURN
from speq.model.chat_template import MAX_TEMPLATE
from speq.model.checkpoint import CheckpointError
from speq.model.input_file import read_limited
from speq.model.loaders.json_file import read_json
from speq.model.loaders.tokenizer_json import check_tokenizer
from speq.model.tokenizer import Tokenizer, from_backend, library_errors

_MAX_TOKENIZER = 1 << 26  # bytes of tokenizer.json

# tokenizer_config.json: names of special tokens, and what else is used.
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_USED = (
    *("add_bos_token", "add_eos_token", "added_tokens_decoder", "chat_template"),
    *("additional_special_tokens", "extra_special_tokens"),
)
# What concerns batches, other tokenizer classes, or repeats tokenizer.json. transformers 5 ignores
# clean_up_tokenization_spaces for BPE.
_WITHOUT_INFLUENCE = (
    *("add_prefix_space", "auto_map", "backend", "clean_up_tokenization_spaces", "do_lower_case"),
    *("errors", "fix_mistral_regex", "from_slow", "is_local", "legacy", "local_files_only"),
    *("max_length", "merges_file", "model_input_names", "model_max_length", "name_or_path"),
    *("pad_to_multiple_of", "pad_token_type_id", "padding", "padding_side", "processor_class"),
    *("response_schema", "return_token_type_ids", "sp_model_kwargs", "special_tokens_map_file"),
    *("spaces_between_special_tokens", "stride", "tokenizer_class", "tokenizer_file"),
    *("tokenizer_type", "transformers_version", "truncation", "truncation_side"),
    *("truncation_strategy", "unk_id", "use_default_system_prompt", "use_fast", "vocab_file"),
)
_NEUTRAL = {
    "split_special_tokens": (None, False),
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": (None, False),
}

# generation_config.json: how to sample is the command's choice, how to compute this program's.
_SAMPLING = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff", "max_length", "max_new_tokens", "num_return_sequences"),
    *("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache"),
    *("cache_implementation", "cache_config", "max_cache_len", "max_time", "use_mtp"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "transformers_version", "compile_config", "disable_compile"),
    *("continuous_batching_config", "low_memory", "prefill_chunk_size", "chat_format"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "target_lookbehind"),
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
    *("assistant_ensemble_weight", "speculation_type", "prompt_lookup_num_tokens"),
    *("max_matching_ngram_size", "early_stopping", "length_penalty", "diversity_penalty"),
    *("trust_remote_code", "attn_implementation", "max_window_size"),
)
# What changes greedy text, with the values under which it does not.
_PLAIN: dict[str, tuple] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), (None, 1)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (None, 0)),
    **dict.fromkeys(("min_length", "min_new_tokens"), (None, 0)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale"), (None, 1)),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "constraints"), (None, [])),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "stop_strings"), (None, [])),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "sequence_bias"), (None,)),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config"), (None,)),
    **dict.fromkeys(("penalty_alpha", "dola_layers"), (None,)),
    **dict.fromkeys(("remove_invalid_values", "renormalize_logits"), (None, False)),
    "token_healing": (None, False),
}


def read_tokenizer(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    """The folder's tokenizer; `settings` is the content of config.json. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    data = read_limited(path, _MAX_TOKENIZER)
    config = _optional(folder / "tokenizer_config.json")
    _check_config(config)
    named = _named_tokens(config, _optional(folder / "special_tokens_map.json"))
    try:
        check_tokenizer(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    try:
        with library_errors():
            backend = tokenizers.Tokenizer.from_buffer(data)
            backend.no_truncation()
            backend.no_padding()
            _add_tokens(backend, config, named)
            vocabulary = from_backend(backend)
            leading, trailing = _around(backend)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    if "add_bos_token" in config or "add_eos_token" in config:
        leading, trailing = _chosen(backend, config, named, leading)
    if trailing:
        names = " ".join(str(backend.id_to_token(i)) for i in trailing)
        warnings.warn(
            f"the tokenizer ends every text with {names:.80}, which is not followed: a prompt that "
            "ends has no continuation",
            stacklevel=2,
        )
    ends = [vocabulary.whole[t] for t in END_OF_TURN if t in vocabulary.whole]
    pieces = {t: vocabulary.piece(i) for t, i in vocabulary.whole.items() if t in END_OF_TEXT}
    ends += [vocabulary.whole[t] for t, piece in pieces.items() if piece and piece.special]
    return Tokenizer(
        vocabulary,
        stop_ids=frozenset([*stop_ids(folder, settings, _id(backend, named, "eos_token")), *ends]),
        leading=leading,
        chat_template=_chat_template(folder, config),
        named=named,
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _check_config(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key in _NEUTRAL and value not in _NEUTRAL[key]:
            raise CheckpointError(
                f"tokenizer_config.json: {key} = {value!r:.60} is not supported, only False"
            )
    known = {*_NAMED, *_USED, *_WITHOUT_INFLUENCE, *_NEUTRAL}
    unknown = [key for key in config if key not in known and not key.endswith("_token")]
    if unknown:
        warnings.warn(
            f"tokenizer_config.json: {', '.join(sorted(unknown)):.200} not known and not used",
            stacklevel=3,
        )


def _content(token: Any, key: str) -> str:
    """A token's text, which is stored alone or with its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise CheckpointError(f"tokenizer_config.json: {key} = {token!r:.60} is not a token")
    return text


def _named_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name (bos_token, image_token ...); the first source that has one
    decides."""
    named: dict[str, str] = {}
    for source in sources:
        extra = source.get("extra_special_tokens")
        for key, value in {**source, **(extra if isinstance(extra, dict) else {})}.items():
            flag = key in ("add_bos_token", "add_eos_token")
            if key.endswith("_token") and not flag and value is not None:
                named.setdefault(key, _content(value, key))
    return named


def _add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]
) -> None:
    """Adds the tokens that only tokenizer_config.json has, as transformers does."""
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise CheckpointError("tokenizer_config.json: added_tokens_decoder is not an object")
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    if not all(re.fullmatch("[0-9]{1,9}", i) for i in added):
        raise CheckpointError("tokenizer_config.json: added_tokens_decoder has a key that is no id")
    by_id = {int(i): token for i, token in added.items()}
    for i, token in sorted(by_id.items()):
        text = _content(token, "added_tokens_decoder")
        if text not in present:
            fields = token if isinstance(token, dict) else {"content": text}
            flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
            chosen = {name: bool(fields[name]) for name in flags if name in fields}
            backend.add_tokens([tokenizers.AddedToken(text, **chosen)])
            present.add(text)
        if backend.token_to_id(text) != i:
            raise CheckpointError(
                f"tokenizer_config.json: {text!r:.60} has id {i}, but {backend.token_to_id(text)} "
                "in tokenizer.json"
            )
    texts = [named[key] for key in _NAMED if key in named]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or []
        if not isinstance(more, list | dict):
            raise CheckpointError(f"tokenizer_config.json: {key} is not a list")
        texts += [_content(token, key) for token in more if isinstance(more, list)]
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(text, special=True, normalized=False)
            for text in dict.fromkeys(texts)
            if text not in present
        ]
    )


def _around(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that tokenizer.json puts before and after a text."""
    for probe in ("a", "0", " ", "the", *sorted(backend.get_vocab())[:1000]):
        try:
            plain = backend.encode(probe, add_special_tokens=False).ids
        except Exception:  # it is unknown, and the vocabulary has no token for that
            continue
        if plain:
            both = backend.encode(probe, add_special_tokens=True).ids
            starts = range(len(both) - len(plain) + 1)
            start = next((i for i in starts if both[i : i + len(plain)] == plain), None)
            if start is None:
                raise CheckpointError("tokenizer.json changes a text by its special tokens")
            return tuple(both[:start]), tuple(both[start + len(plain) :])
    raise CheckpointError("tokenizer.json encodes no text")


def _chosen(
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    named: Mapping[str, str],
    stored: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens before and after a text where tokenizer_config.json chooses them: in transformers
    5 they replace those of tokenizer.json."""
    chosen = []
    for end in ("bos", "eos"):
        value = config.get(f"add_{end}_token")
        if value not in (None, False, True):
            raise CheckpointError(f"tokenizer_config.json: add_{end}_token is {value!r:.60}")
        token = _id(backend, named, f"{end}_token")
        chosen.append((token,) if value and token is not None else ())
    if chosen[0] != stored:
        names = [[backend.id_to_token(i) for i in ids] for ids in (chosen[0], stored)]
        warnings.warn(
            f"tokenizer_config.json begins texts with {names[0]}, tokenizer.json with {names[1]}: "
            "the former is followed, as by transformers 5",
            stacklevel=3,
        )
    return chosen[0], chosen[1]


def _id(backend: tokenizers.Tokenizer, named: Mapping[str, str], key: str) -> int | None:
    """The id of a named special token, if there is one."""
    return backend.token_to_id(named[key]) if key in named else None


def stop_ids(folder: Path, settings: Mapping[str, Any], otherwise: int | None = None) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json, whose content is `settings`,
    else the tokenizer's. Raises CheckpointError."""
    generation = _optional(folder / "generation_config.json")
    changed = [k for k, v in generation.items() if k in _PLAIN and v not in _PLAIN[k]]
    if changed:
        values = ", ".join(f"{key} = {generation[key]!r:.40}" for key in sorted(changed))
        warnings.warn(
            f"generation_config.json: {values} not applied: text comes from the logits alone",
            stacklevel=3,
        )
    known = {*_SAMPLING, *_PLAIN}
    unknown = [key for key in generation if key not in known and not key.startswith("_")]
    if unknown:
        warnings.warn(
            f"generation_config.json: {', '.join(sorted(unknown)):.200} not known and not used",
            stacklevel=3,
        )
    stop = generation.get("eos_token_id", settings.get("eos_token_id"))
    if stop is None:
        stop = otherwise
    stop = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if any(type(token) is not int for token in stop):
        raise CheckpointError("eos_token_id is not a token id")
    return stop


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str:
    """The default chat template: of chat_template.jinja, else of tokenizer_config.json."""
    stored = config.get("chat_template") or ""
    if isinstance(stored, list):  # of several, by name
        pairs = [(str(t.get("name")), t.get("template")) for t in stored if isinstance(t, dict)]
        if "default" not in dict(pairs):
            warnings.warn(
                f"no chat template is named 'default', only {[name for name, _ in pairs]!r:.100}",
                stacklevel=3,
            )
        stored = dict(pairs).get("default", "")
    if not isinstance(stored, str):
        raise CheckpointError("tokenizer_config.json: chat_template is not a text")
    path = folder / "chat_template.jinja"
    if not path.exists():
        return stored
    try:
        template = read_limited(path, MAX_TEMPLATE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path.name} is not UTF-8") from error
    template = template.replace("\r\n", "\n").replace("\r", "\n")
    if stored and stored != template:
        warnings.warn(
            f"{path.name} and chat_template of tokenizer_config.json differ: the former is "
            "followed, as by transformers",
            stacklevel=3,
        )
    return template
