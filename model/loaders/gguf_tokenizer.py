# SPDX-License-Identifier: Apache-2.0
"""The tokenizer in a GGUF file's metadata (`tokenizer.*`)."""

from speq.model.checkpoint import CheckpointError
from speq.model.loaders.gguf_file import Metadata
from speq.model.tokenizer import Tokenizer, byte_level_bpe, sentencepiece_bpe

_CONTROL, _USER_DEFINED = 3, 4  # token types that are matched as a whole


def read_tokenizer(metadata: Metadata) -> Tokenizer:
    """The file's tokenizer. Raises CheckpointError."""
    key = "tokenizer.ggml."
    kind = metadata.get(key + "model", str)
    tokens = metadata.strings(key + "tokens")
    types = metadata.numbers(key + "token_type")
    special = [i for i, t in enumerate(types[: len(tokens)]) if t in (_CONTROL, _USER_DEFINED)]
    try:
        if kind == "gpt2":
            splitter = metadata.get(key + "pre", str, "gpt-2")
            backend = byte_level_bpe(tokens, metadata.strings(key + "merges"), special, splitter)
        elif kind == "llama":
            prefix = metadata.get(key + "add_space_prefix", bool, True)
            scores = metadata.numbers(key + "scores")
            backend = sentencepiece_bpe(tokens, scores, special, prefix)
        else:
            raise CheckpointError(f"tokenizer {kind!r:.40} is not supported, only gpt2 and llama")
    except CheckpointError:
        raise
    except Exception as error:  # the package raises bare Exception
        raise CheckpointError(f"tokenizer: {error}") from error
    stop = [key + name for name in ("eos_token_id", "eot_token_id")]
    use_bos = metadata.get(key + "add_bos_token", bool, kind == "llama")
    return Tokenizer(
        backend,
        stop_ids=frozenset(metadata.get(name, int) for name in stop if name in metadata.fields),
        bos_id=metadata.get(key + "bos_token_id", int) if use_bos else None,
        chat_template=metadata.get("tokenizer.chat_template", str, ""),
    )
