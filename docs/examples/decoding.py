# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding, token by token: who proposed what, and what was accepted.

    .venv/bin/python docs/examples/decoding.py

The cells open as a notebook in VS Code, Spyder, or with jupytext.
"""

# %% [markdown]
# # Decoding with a draft
#
# The draft model is in the weights: four of their sixteen bits. It proposes a chain of tokens; one
# pass of the full model then says which of them it would have written itself.

# %%
import torch

import speq

model = speq.load("tiny")
encoded = speq.encode(model)
prompt = "Once upon a time"
settings = speq.Settings(rows=8, threshold=1.0)

# %% [markdown]
# ## Step by step
#
# Each line is one pass of the full model. *drafted* is the length of the chain that it checked,
# *accepted* how many of its tokens stood. Behind them comes a token of the target's own. Where the
# draft's first choice was wrong, a row of the array that the chain left free may have had its
# second or third choice: then that alternate is accepted, and the target's token follows it.

# %%
MARKS = {"draft": "{}", "alternate": "<{}>", "guess": "({})", "target": "[{}]"}


def marked(step: speq.Step) -> str:
    """The step's tokens: plain if drafted, in <> if an alternate, in () if guessed, in [] if the
    target's own."""
    names = (repr(model.tokenizer.decode([token]))[1:-1] for token in step.tokens)
    return "".join(
        MARKS[origin].format(name) for name, origin in zip(names, step.origins, strict=True)
    )


print("drafted accepted  tokens")
steps = []
for _, step in speq.stream(model, prompt, encoded, max_tokens=48, settings=settings, raw=True):
    steps.append(step)
    print(f"{step.drafted:7} {step.accepted:8}  {marked(step)}")

committed = sum(len(step.tokens) for step in steps)
assert committed == 48 and len(steps) < committed
assert {origin for step in steps for origin in step.origins} == {"draft", "alternate", "target"}

# %% [markdown]
# ## Nothing is lost
#
# Plain decoding, one token a pass, gives the same tokens. Not only that: it gives the same logits,
# bit for bit, because a row of a pass depends on nothing but the tokens before it.

# %%
plain = speq.generate(model, prompt, max_tokens=48, raw=True, keep_logits=True)
tokens = [token for step in steps for token in step.tokens]
assert tokens == plain.tokens
both = (torch.cat([step.logits for step in some]) for some in (steps, plain.steps))
mine, expected = (logits.view(torch.int32) for logits in both)
print(f"{mine.numel():,} logits, {int((mine != expected).sum())} of them differ")
assert torch.equal(mine, expected)

# %% [markdown]
# ## What it is worth
#
# A draft pass reads a quarter of the memory of a full pass, and memory is what decoding waits for.

# %%
statistics = speq.Statistics()
for step in steps:
    statistics.add(step)
print(f"{statistics.match_rate:.0%} of {statistics.compared} compared draft tokens were right")
print(f"{statistics.tokens_per_pass:.2f} tokens for each pass of the full model")
print(f"{statistics.speedup():.2f} times as fast as token by token, if memory is the limit")
assert statistics.speedup() > 1.2

# %% [markdown]
# ## How sure the draft was
#
# The draft stops where its best token is hardly better than its second best. Here are the margins
# of its chains, and how far each was right.

# %%
print("margins of the logits along the chain (| is where it stopped being right)")
for step in steps:
    margins = [f"{margin:5.2f}" for margin in step.margins]
    margins.insert(step.accepted, "|")
    print(" ".join(margins))
right = [m for step in steps for m in step.margins[: step.accepted]]
wrong = [
    step.margins[step.accepted]
    for step in steps
    if step.accepted < step.drafted and len(step.tokens) > step.accepted
]
print(f"median of the tokens that were right {sorted(right)[len(right) // 2]:.2f}")
print(f"median of those that were refused    {sorted(wrong)[len(wrong) // 2]:.2f}")
assert sorted(right)[len(right) // 2] > sorted(wrong)[len(wrong) // 2]

# %% [markdown]
# ## On the hardware
#
# `speq.simulated_session(model, encoded)` in the place of the model decodes the same on the
# Verilog, with every cycle counted; docs/api.md shows it.
