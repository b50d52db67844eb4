# SPDX-License-Identifier: Apache-2.0
"""`python -m speq.cli.train_tiny -o FOLDER` (`make tiny`): trains the model `tiny` once more.

The training is that of `speq.model.train_tiny`; the same seed, machine and torch give the same
bytes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

#: How each file that `speq.model.train_tiny.save` writes begins.
MARKS = {
    "config.json": rb'\{\s*"architectures": \[\s*"LlamaForCausalLM"\s*\],'
    rb'\s*"model_type": "llama",\s*"vocab_size": 512,\s*"hidden_size": 64,',
    "model.safetensors": rb'(?s).{8}\{"__metadata__":\{"format":"pt"\},'
    rb'"model\.embed_tokens\.weight":\{"dtype":"F16","shape":\[512,64\],',
    "tokenizer.json": rb'\{"version":"1\.0",.{,100}\[\{"id":0,"content":"<\|begin\|>",',
}


def main(arguments: list[str] | None = None) -> None:
    """The command line; exits with one line on standard error if the folder cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m speq.cli.train_tiny",
        description="Train the model 'tiny' on generated stories.",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights (0)")
    parser.add_argument("--steps", type=int, help="training steps (those of the shipped model)")
    parser.add_argument(
        "--force", action="store_true", help="replace files that this command did not write"
    )
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error(f"steps is {options.steps}; expected at least 1")
    from speq.cli import describe
    from speq.hw.common.files import staged

    try:
        with staged(options.output, MARKS, force=options.force) as folder:
            train_into(folder, options.seed, options.steps)
    except OSError as error:
        sys.exit(f"error: {describe(error)}")


def train_into(folder: Path, seed: int, steps: int | None) -> None:
    """Train, print the held-out loss and some stories, and write the model to a folder."""
    # These load torch: the options and the output are right by now.
    import torch

    from speq.model import train_tiny
    from speq.model.stories import held_out_stories

    steps = train_tiny.STEPS if steps is None else steps
    tokenizer = train_tiny.train_tokenizer()
    rows, context = train_tiny.ROWS, train_tiny.CONTEXT
    print(f"seed {seed}, {steps} steps of {rows} x {context} tokens", flush=True)
    model, _ = train_tiny.train(tokenizer, seed, steps)
    held_out = train_tiny.token_rows(tokenizer, held_out_stories(), context)
    with torch.no_grad():
        loss = train_tiny.loss_of(model, torch.tensor(list(itertools.islice(held_out, 32))))
    print(f"held-out stories: {loss.item():.4f} nats per token")
    for prompt in ("Once upon a time", "One day, a little girl", "The dog"):
        print(train_tiny.continuation(model, tokenizer, prompt))
    train_tiny.save(model, tokenizer, folder)


if __name__ == "__main__":
    main()
