# SPDX-License-Identifier: Apache-2.0
"""A matrix product through the RTL, compared with exact arithmetic, bit for bit.

    .venv/bin/python docs/examples/matrix_product.py

It needs g++, make and perl, and a minute for building the simulation when it runs first. The
cells open as a notebook in VS Code, Spyder, or with jupytext.
"""

# %% [markdown]
# # One matrix product, bit for bit
#
# The matrix engine multiplies FP16 activations with FP16 weights. Its sums are exact and are
# rounded once, at the end. So every output has one right answer, which a few lines of Python can
# compute with fractions, and the RTL must give its bits.

# %%
from fractions import Fraction

import numpy as np
import torch

import speq
from speq.model.arith import quantize_activations
from speq.model.format import encode

config = speq.EngineConfig(rows=4, cols=6, draft_rows=2, max_k=300)
tokens, k, outputs = 3, 200, 10

generator = np.random.default_rng(0)
activations = generator.normal(size=(tokens, k)).astype(np.float16)
weights = generator.normal(size=(outputs, k), scale=0.05).astype(np.float16)

# %% [markdown]
# ## Exact arithmetic
#
# An FP16 number is a fraction. Sums of fractions have no error, and rounding to FP32 is to keep 24
# bits: the fraction, divided by the unit of the last bit that stays, becomes an integer.


# %%
def exact_products(x: np.ndarray, w: np.ndarray) -> list[list[Fraction]]:
    """x @ w.T as fractions."""
    rows, columns = ([[Fraction(float(n)) for n in row] for row in matrix] for matrix in (x, w))
    return [[sum(map(Fraction.__mul__, a, b), Fraction(0)) for b in columns] for a in rows]


def rounded(value: Fraction) -> np.float32:
    """The nearest FP32 number; of two, the even one. `value` is a multiple of a power of two."""
    if not value:
        return np.float32(0)
    largest = abs(value.numerator).bit_length() - value.denominator.bit_length()  # floor(log2)
    unit = Fraction(2) ** max(largest - 23, -149)
    return np.float32(float(round(value / unit) * unit))  # Python rounds to even


def bits(values: np.ndarray) -> np.ndarray:
    """FP32 numbers as their bit patterns."""
    return np.asarray(values, np.float32).view(np.uint32)


exact = exact_products(activations, weights)
expected = np.array([[rounded(value) for value in row] for row in exact])

# %% [markdown]
# ## Verify mode, and plain FP16
#
# `speq.gemm` encodes the weights, streams them through the engine's Verilog in the simulator and
# gives the results. In bypass mode the weights are not encoded, as the KV cache is not.

# %%
for mode in ("verify", "bypass"):
    result = speq.gemm(activations, weights, config, mode=mode)
    wrong = int(np.bitwise_count(bits(expected) ^ result.output).sum())
    print(f"{mode}: {result.output.size} outputs, {wrong} bits differ, {result.cycles} cycles")
    assert wrong == 0

# %% [markdown]
# That is not what a sum in FP32 gives, which rounds after every addition and depends on the order.

# %%
forwards, backwards = (
    np.array(
        [
            [
                np.add.accumulate((a.astype(np.float32) * b)[::step], dtype=np.float32)[-1]
                for b in weights
            ]
            for a in activations
        ]
    )
    for step in (1, -1)
)
for name, summed in (("forwards", forwards), ("backwards", backwards)):
    different = int((bits(summed) != bits(expected)).sum())
    print(f"summed {name} in FP32: {different} of {summed.size} outputs have other bits")
    assert different
assert (bits(forwards) != bits(backwards)).any()

# %% [markdown]
# ## Draft mode
#
# A draft pass reads four bits of every weight, and takes activations of eight bits with an exponent
# for each group of 64. These are other numbers, but they are fractions as well, and their sum is as
# exact.

# %%
row = activations[:1]
drafted_weights = encode(torch.from_numpy(weights), config.format, columns=config.cols).draft()
drafted_activations = quantize_activations(torch.from_numpy(row), config.format.group).values()

draft = exact_products(drafted_activations.numpy(), drafted_weights.numpy())
expected = np.array([[rounded(value) for value in line] for line in draft])
result = speq.gemm(row, weights, config, mode="draft")
wrong = int(np.bitwise_count(bits(expected) ^ result.output).sum())
print(f"draft: {result.output.size} outputs, {wrong} bits differ, {result.cycles} cycles")
assert wrong == 0

# %% [markdown]
# How good a draft is it? Good enough to guess the next token most of the time.

# %%
true = np.array([[float(value) for value in line] for line in exact])[0]
error = np.linalg.norm(result.values[0] - true) / np.linalg.norm(true)
print(f"the draft's outputs are {error:.0%} off")
assert 0 < error < 0.2
