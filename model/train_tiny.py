# SPDX-License-Identifier: Apache-2.0
"""Training of the model `tiny` from nothing but a seed; `make tiny` runs it.

A Llama of about 260,000 parameters learns the stories of `speq.model.stories`. A folder gets
config.json, model.safetensors (FP16) and tokenizer.json in Hugging Face's layout. One thread, no
other source of randomness than the seed: the same machine and torch give the same bytes again.

Every row of a batch starts with the beginning of a story and holds as many stories, one after the
other, as fit; no story is seen twice. Training rows are as long as the model's context.
"""

import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from speq.model.stories import training_stories

HIDDEN, FFN, BLOCKS, HEADS, KV_HEADS = 64, 172, 5, 4, 2
HEAD_DIM = HIDDEN // HEADS
VOCABULARY, CONTEXT = 512, 512
NORM_EPS, ROPE_BASE = 1e-5, 10_000.0
BEGIN, END, UNKNOWN = "<|begin|>", "<|end|>", "<|unknown|>"
TOKENIZER_STORIES = 5_000

ROWS, STEPS = 8, 3_400
PEAK_RATE, LAST_RATE, WARM_UP = 6e-3, 0.02, 100
WEIGHT_DECAY, CLIP = 0.05, 1.0


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE of `VOCABULARY` tokens; BEGIN comes before every text.

    Bytes other than printable ASCII, which the stories never have, become UNKNOWN: that leaves the
    tokens that they would take to whole words.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END, UNKNOWN],
        initial_alphabet=[*map(chr, range(33, 127)), "Ġ", "Ċ"],  # space and line break
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(training_stories(), TOKENIZER_STORIES), trainer)
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", None, [begin])
    return tokenizer


def token_rows(tokenizer: Tokenizer, stories: Iterator[str], length: int) -> Iterator[list[int]]:
    """Rows of `length` token ids: whole stories, each between BEGIN and END, the last one cut."""
    end = tokenizer.token_to_id(END)
    while True:
        row: list[int] = []
        while len(row) < length:
            row += [*tokenizer.encode(next(stories)).ids, end]
        yield row[:length]


def rotary_table(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [length, HEAD_DIM / 2] for pairs (i, i + HEAD_DIM / 2)."""
    frequencies = ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of x [N, heads, T, HEAD_DIM]."""
    cos, sin = table
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm; members carry Hugging Face's names."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN, NORM_EPS)
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, NORM_EPS)
        sizes = {"q": HIDDEN, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM, "o": HIDDEN}
        self.self_attn = nn.ModuleDict(
            {f"{name}_proj": nn.Linear(HIDDEN, size, bias=False) for name, size in sizes.items()}
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(HIDDEN, FFN, bias=False),
                "up_proj": nn.Linear(HIDDEN, FFN, bias=False),
                "down_proj": nn.Linear(FFN, HIDDEN, bias=False),
            }
        )

    def forward(self, h: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """h [N, T, HIDDEN] -> [N, T, HIDDEN]."""
        x = self.input_layernorm(h)
        q, k, v = (
            self.self_attn[f"{name}_proj"](x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for name in "qkv"
        )
        mixed = F.scaled_dot_product_attention(
            rotate(q, table), rotate(k, table), v, is_causal=True, enable_gqa=True
        )
        h = h + self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(2))
        x = self.post_attention_layernorm(h)
        gated = F.silu(self.mlp["gate_proj"](x)) * self.mlp["up_proj"](x)
        return h + self.mlp["down_proj"](gated)


class TinyLlama(nn.Module):
    """The model in training: float32, whole rows at once."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.RMSNorm(HIDDEN, NORM_EPS)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # Layers that add to the residual stream start smaller, as many as there are.
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * BLOCKS if adds else 1
                std = 0.05 if name.startswith("embed") else (weight.shape[1] * depth) ** -0.5
                nn.init.normal_(weight, std=std)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [N, T] -> logits [N, T, VOCABULARY]."""
        h, table = self.embed_tokens(tokens), rotary_table(tokens.shape[1])
        for layer in self.layers:
            h = layer(h, table)
        return F.linear(self.norm(h), self.embed_tokens.weight)


def loss_of(model: TinyLlama, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy (nats per token) of rows [N, T], each token given those before it."""
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to `LAST_RATE` of the peak."""
    warm_up = min(WARM_UP, steps // 10 + 1)
    if step < warm_up:
        return PEAK_RATE * (step + 1) / warm_up
    progress = (step - warm_up) / max(steps - warm_up, 1)
    return PEAK_RATE * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2)


def train(
    tokenizer: Tokenizer, seed: int, steps: int, rows: int = ROWS, length: int = CONTEXT
) -> tuple[TinyLlama, list[float]]:
    """A trained model and the loss of every step; prints progress. Uses one thread."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    model = TinyLlama()
    matrices = [w for w in model.parameters() if w.dim() == 2]
    norms = [w for w in model.parameters() if w.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0}],
        betas=(0.9, 0.98),
    )
    text = token_rows(tokenizer, training_stories(), length)
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_of(model, torch.tensor(list(itertools.islice(text, rows))))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            recent = losses[-100:]
            seconds = time.perf_counter() - started
            print(
                f"step {step + 1} of {steps}: loss {sum(recent) / len(recent):.4f}, "
                f"{seconds:.0f} s, {seconds / (step + 1) * (steps - step - 1):.0f} s left",
                flush=True,
            )
    return model, losses


@torch.no_grad()
def continuation(model: TinyLlama, tokenizer: Tokenizer, prompt: str, limit: int = 256) -> str:
    """The prompt and its likeliest continuation, up to END or `limit` tokens."""
    ids, end = tokenizer.encode(prompt).ids, tokenizer.token_to_id(END)
    while len(ids) < limit and ids[-1] != end:
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return tokenizer.decode(ids)


def save(model: TinyLlama, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes config.json, model.safetensors (FP16) and tokenizer.json to an existing folder."""
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_BASE,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "bos_token_id": tokenizer.token_to_id(BEGIN),
        "eos_token_id": tokenizer.token_to_id(END),
    }
    weights = {f"model.{name}": w.detach().half() for name, w in model.state_dict().items()}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
