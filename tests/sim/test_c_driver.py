# SPDX-License-Identifier: Apache-2.0
"""The C driver on the RTL of an accelerator: the golden model's tokens."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from speq.host.image import model_image
from speq.host.image_file import write_image
from speq.host.registers import Registers
from speq.host.session import Session
from speq.model.encoding import encode_linears
from speq.model.settings import Sampling, Settings
from speq.sim.session import top_verilog
from speq.sim.simulated_board import MemoryOptions, SimulatedBoard
from tests.host.c_driver import CDriver, compile_driver
from tests.host.decoding import GUESSING, SEED
from tests.model.drafted import drafted_model
from tests.model.small_models import random_tokens
from tests.sim.configurations import FEW

ROWS = FEW.engine.rows


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_driver(FEW, tmp_path_factory.mktemp("driver"))


def test_runs_without_steps_on_the_rtl(library: ctypes.CDLL, tmp_path: Path) -> None:
    """Behind a prompt of several passes and behind the run before, with a stop token, sampled; with
    the interrupt and without; ended by the caller in the middle."""
    model = drafted_model("llama", SEED, blocks=1)
    encoded = encode_linears(model)
    session = Session(model, encoded)

    def golden(text: list[int], **options: object) -> list[int]:
        steps = session.golden(text, settings=Settings(ROWS, 0), **options)
        return [token for step in steps for token in step.tokens]

    image = model_image(FEW, model, encoded, settings=Settings(ROWS, 2, 0.1, 3, policy=GUESSING))
    write_image(tmp_path / "model.image", image)
    base = 3 * FEW.load_alignment
    memory = MemoryOptions(image.size, base, latency=16)
    with SimulatedBoard(top_verilog(FEW), FEW, memory) as board:
        driver = CDriver(library, board, (tmp_path / "model.image").read_bytes())
        assert driver.load(base, image.size) == "OK"
        registers = Registers(board, FEW)
        for i in range(8):
            prompt = random_tokens(model.config, 3, SEED + i) * 3
            text = golden(prompt, max_tokens=12)
            assert driver.generate(prompt, max_tokens=12) == ("OK", text)
            if registers["ALTERNATE_HITS"] + registers["GUESS_HITS"] > 1:
                break
        else:
            raise AssertionError("no entry of the KV cache has been moved")
        cut = text[: text.index(text[6]) + 1]
        got = driver.generate(prompt, max_tokens=12, stops=[text[6]], resume=len(prompt))
        assert got == ("OK", cut)
        longer = [*prompt, *cut, 5]
        expected = golden(longer, max_tokens=4)
        assert driver.generate(longer, max_tokens=4, resume=len(longer)) == ("OK", expected)
        generator = torch.Generator().manual_seed(SEED)
        expected = golden(prompt, max_tokens=4, sampling=Sampling(0.8), generator=generator)
        got = driver.generate(prompt, max_tokens=4, sample=1, temperature=0.8, seed=SEED)
        assert got == ("OK", expected)
        polling = CDriver(library, board, (tmp_path / "model.image").read_bytes(), waits=False)
        assert polling.load(base, image.size) == "OK"
        assert polling.generate(prompt, max_tokens=12, cancel=1) == ("CANCELLED", text[:1])
        assert registers["RING_INDEX"] < 12
        longer = [*prompt, text[0]]
        got = polling.generate(longer, max_tokens=2, plain=1, resume=len(longer))
        assert got == ("OK", text[1:3])
