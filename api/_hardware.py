# SPDX-License-Identifier: Apache-2.0
"""The hardware: its Verilog, and products, programs and models on it in the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig, check_range
from speq.hw.verilog import write_verilog

if TYPE_CHECKING:
    import numpy as np
    import torch

    from speq.host.session import Session
    from speq.model.checkpoint import Model
    from speq.model.encoded_file import EncodedModel
    from speq.sim.benches.gemm_engine import GemmResult
    from speq.sim.simulated_board import SimulatedBoard


def build_verilog(
    config: EngineConfig | AcceleratorConfig, path: str | Path, *, force: bool = False
) -> tuple[Path, ...]:
    """Write the Verilog of an accelerator, or of a matrix engine alone, and what goes with it.

    Beside the Verilog of an accelerator lie its description (JSON), register map (Markdown), C
    header, FuseSoC core and an example of its use; beside an engine's its description. All of them
    appear, or none. The same configuration gives the same bytes.

    Parameters
    ----------
    config : AcceleratorConfig or EngineConfig
    path : str or Path
        Of the Verilog, ending in .v.
    force : bool
        Replace files that were not generated.

    Returns
    -------
    tuple of Path
        The files, the Verilog first.

    Raises
    ------
    ValueError
        If the path does not end in .v.
    OSError
        If the folder does not exist or cannot be written, or another file is in the way.
    """
    return write_verilog(config, Path(path), force=force)


def gemm(
    activations: np.ndarray | torch.Tensor,
    weights: np.ndarray | torch.Tensor,
    config: EngineConfig | None = None,
    *,
    mode: Literal["verify", "draft", "bypass"] = "verify",
) -> GemmResult:
    """The product activations @ weights.T, computed by the matrix engine's RTL in the simulator.

    Every sum is exact and rounded once to FP32, in all modes. A simulation is built for each
    configuration once, which takes half a minute for 8 x 16 PEs, and kept.

    Parameters
    ----------
    activations : float16 [T, K]
        At most as many tokens T as the array has rows; in draft mode, as it has drafting rows,
        which is 1 by default.
    weights : float16 [O, K]
        Encoded in the configuration's format first, but for bypass mode.
    config : EngineConfig, optional
        8 x 16 PEs when not given.
    mode : {"verify", "draft", "bypass"}
        With all 16 bits of the encoded weights; with their 4 draft bits and activations of 8 bits
        and an exponent for each group; with plain FP16 weights.

    Returns
    -------
    GemmResult
        `values` float32 [T, O], their bit patterns `output`, and `cycles`.

    Raises
    ------
    ValueError
        If the operands are no FP16 matrices, their K differ, or they do not fit the engine.
    SimulationError
        If the simulation cannot be built or fails.
    """
    import torch

    from speq.model.arith import quantize_activations
    from speq.model.format import encode
    from speq.sim.benches.gemm_engine import Gemm, run_gemms

    config = config or EngineConfig()
    x, w = (torch.as_tensor(operand) for operand in (activations, weights))
    for name, operand in (("activations", x), ("weights", w)):
        if operand.dtype != torch.float16 or operand.ndim != 2:
            raise ValueError(
                f"{name} are {operand.dtype} of shape {list(operand.shape)}; expected a matrix of "
                "float16"
            )
    if mode not in ("verify", "draft", "bypass"):
        raise ValueError(f"mode is {mode!r}; expected verify, draft or bypass")
    if not config.draft_rows and mode != "bypass":
        raise ValueError(f"the engine has no draft_rows: it cannot {mode}, only bypass")
    (tokens, k), (o, weights_k) = x.shape, w.shape
    if k != weights_k:
        raise ValueError(f"K is {k} in the activations and {weights_k} in the weights")
    check_range("K", k, 1, config.max_k)
    check_range("O", o, 1, config.max_o)
    check_range("T", tokens, 1, config.draft_rows if mode == "draft" else config.rows)
    operand = w if mode == "bypass" else encode(w, config.format, columns=config.cols)
    block = quantize_activations(x, config.format.group) if mode == "draft" else x
    return run_gemms(config, [Gemm(block, operand)]).results[0]


def simulate(
    config: AcceleratorConfig | None = None, *, size: int = 1 << 20, **memory: Any
) -> SimulatedBoard:
    """The accelerator's RTL in the simulator, with memory: what a host sees of a board.

    It has registers, an interrupt line and memory (`speq.host.board.Board` says which calls there
    are); a simulation is built for each configuration once, which takes a minute or two, and kept.
    A context manager, at the end of which the simulator ends.

    Parameters
    ----------
    config : AcceleratorConfig, optional
        8 x 16 PEs when not given.
    size : int
        Bytes of memory, from address 0 on unless `base` says otherwise.
    **memory
        How it behaves: further members of `speq.sim.simulated_board.MemoryOptions`, such as
        `latency` in cycles.

    Returns
    -------
    SimulatedBoard

    Raises
    ------
    ValueError
        If a value is out of its range.
    SimulationError
        If the simulation cannot be built.
    """
    from speq.sim.session import top_verilog
    from speq.sim.simulated_board import MemoryOptions, SimulatedBoard

    config = config or AcceleratorConfig()
    return SimulatedBoard(top_verilog(config), config, MemoryOptions(size, **memory))


def simulated_session(
    model: Model,
    encoded: EncodedModel | None = None,
    config: AcceleratorConfig | None = None,
    *,
    context: int = 256,
    **memory: Any,
) -> Session:
    """A model on the accelerator's RTL in the simulator, for `generate` and `stream`.

    A context manager, at the end of which the simulator ends.

    Parameters
    ----------
    model : Model
    encoded : EncodedModel, optional
        With 4-bit drafts in the format of the accelerator. Without it there is no drafting.
    config : AcceleratorConfig, optional
        8 x 16 PEs, made to fit the model, when not given.
    context : int
        Tokens of prompt and text that there is room for.
    **memory
        As of `simulate`.

    Returns
    -------
    Session

    Raises
    ------
    ValueError
        If the model or its encoding does not fit the accelerator.
    SimulationError
        If the simulation cannot be built.
    """
    from speq.host.session import accelerator_for
    from speq.sim.session import simulated_session as session

    tensors = encoded.tensors if encoded else {}
    engine = config.engine if config else EngineConfig()
    capacity = min(context, model.config.context) + engine.rows
    config = config or accelerator_for(model, tensors, engine.rows, engine.cols, capacity)
    return session(model, tensors, config, capacity=capacity, **memory)
