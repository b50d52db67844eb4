# SPDX-License-Identifier: Apache-2.0
"""How the exponent remap turns a weight into a draft of itself, with plots.

    .venv/bin/python docs/examples/remap.py build/examples

writes two plots to that folder. The cells open as a notebook in VS Code, Spyder, or with jupytext.
"""

# %% [markdown]
# # A draft inside the weight
#
# An FP16 weight has a sign, five bits of exponent and ten of mantissa. The remap permutes exponents
# so that the *first four bits* of the stored word are a usable weight by themselves. No bit is
# added, none is lost.

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import speq
from speq.model.format import encode
from speq.model.number_format import draft_levels, remap_table

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/examples")
folder.mkdir(parents=True, exist_ok=True)
config = speq.FormatConfig(group=64, split=2)

# %% [markdown]
# ## One weight
#
# The group's largest weight has exponent field 11; that is its base. Our weight, 0.04, has 10: a
# distance t of 1. Its top mantissa bit says which half of that exponent it is in. The table gives
# the class q, three bits of the draft, and the slot r inside the class.

# %%
pattern = int(np.float16(0.04).view(np.uint16))
exponent, mantissa = pattern >> 10 & 31, pattern & 0x3FF
base = 11
t, half = base - exponent, mantissa >> 9
table = remap_table(config.split)
q, r = divmod(table[2 * t + half], 8)
word = (pattern & 0x8000) | q << 12 | r << 9 | (mantissa & 0x1FF)
print(f"FP16   {pattern:016b} = {np.uint16(pattern).view(np.float16)}: t = {t}, half {half}")
print(f"stored {word:016b}: draft code {word >> 12:04b}, residual {word & 0xFFF:012b}")

level = draft_levels(config)[q].value * 2.0 ** (base - 15 + config.level_unit_exponent)
print(f"the draft's weight is {level:.4f}")
assert abs(level / 0.04 - 1) < 0.25

# %% [markdown]
# The way back is the same table: it is a bijection, so nothing can be lost.

# %%
assert sorted(table) == list(range(64))
back_t, back_half = divmod(table.index(word >> 9 & 63), 2)
back = (word & 0x8000) | (base - back_t) % 32 << 10 | back_half << 9 | (word & 0x1FF)
assert back == pattern

# %% [markdown]
# ## All weights of a group
#
# The draft knows eight magnitudes. Each stands for the weights of its class: the two largest
# exponents are told apart by halves, the next three have a class each, and class 0 has four.

# %%
fractions = np.linspace(2.0**-9, 1.99, 4000)
magnitudes = (fractions * 2.0 ** (base - 15)).astype(np.float16)
distance = base - (magnitudes.view(np.uint16) >> 10).astype(int)
halves = magnitudes.view(np.uint16) >> 9 & 1
classes = np.array(table)[2 * distance + halves] >> 3
units = np.array([step.value for step in draft_levels(config)])
drafts = units[classes] * 2.0 ** (base - 15 + config.level_unit_exponent)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
left.plot(magnitudes, magnitudes, color="grey", linewidth=1, label="FP16 weight")
for number in range(8):
    chosen = classes == number
    left.plot(magnitudes[chosen], drafts[chosen], ".", markersize=3, label=f"class {number}")
left.set(xscale="log", yscale="log", xlabel="magnitude of the weight", ylabel="of its draft")
left.set_title("Eight magnitudes stand for all")
left.legend(fontsize=7, ncols=2)

owners = np.array(table).reshape(32, 2) >> 3
image = right.imshow(owners.T, aspect="auto", cmap="viridis", origin="lower")
right.set(xlabel="t: exponents below the group's largest", ylabel="top mantissa bit")
right.set_yticks([0, 1])
right.set_title("Class q of every half-exponent: far ones fill free slots")
figure.colorbar(image, ax=right, label="class q")
figure.savefig(folder / "remap.png", dpi=120)

# Within the first nine exponents a draft is of the right size: the classes of a half-exponent are
# within a quarter, those of an exponent within half, class 0 within a factor of six.
assert (classes[distance <= 1] >= 4).all()
for owned, bound in ((distance <= 1, 1.26), (distance <= 4, 1.51), (distance <= 8, 6.1)):
    ratio = drafts[owned] / magnitudes[owned].astype(float)
    assert (ratio < bound).all() and (ratio > 1 / bound).all()

# %% [markdown]
# ## A trained layer
#
# Weights of a trained layer lie close to the largest of their group, so that hardly any is drafted
# with a wrong size. Every weight comes back bit for bit.

# %%
model = speq.load("tiny")
weights = model.weights["block.2.up_proj"]
encoded = encode(weights, config, name="block.2.up_proj")
assert encoded.decode().numpy().tobytes() == weights.numpy().tobytes()

values, drafted = weights.float().numpy(), encoded.draft().numpy()
error = np.linalg.norm(drafted - values) / np.linalg.norm(values)
print(f"{values.size:,} weights: the draft is {error:.1%} off, reading a quarter of the bits")
assert error < 0.15

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
left.plot(values.ravel(), drafted.ravel(), ".", markersize=1, alpha=0.3)
left.axline((0, 0), slope=1, color="grey", linewidth=1)
left.set(xlabel="weight", ylabel="its draft", title="Every weight of a layer and its draft")

grouped = np.abs(values)[:, : values.shape[1] // 64 * 64].reshape(len(values), -1, 64)
exponents = np.floor(np.log2(np.maximum(grouped, 2.0**-14))).astype(int)
distances = (exponents.max(axis=2, keepdims=True) - exponents).ravel()
right.hist(distances, bins=np.arange(distances.max() + 2) - 0.5, color="tab:green")
right.axvspan(8.5, max(distances.max(), 9) + 0.5, color="tab:red", alpha=0.15)
right.set(xlabel="t: exponents below the group's largest", ylabel="weights")
right.set_title("Nearly all are where the draft is right (white)")
figure.savefig(folder / "layer.png", dpi=120)

far = (distances > 8).mean()
print(f"{far:.2%} of the weights are further below than the draft's classes reach")
assert far < 0.01
