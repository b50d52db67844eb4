# SPDX-License-Identifier: Apache-2.0
"""The memory reader and writer: parameters, ports, Verilog, and transfers to models of memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from amaranth.lib import wiring

from speq.hw.common.ram_fifo import RamFifo
from speq.hw.memory.axi import ID_BITS, AxiConfig
from speq.hw.memory.memory_reader import MemoryReader
from speq.hw.memory.memory_writer import MemoryWriter
from speq.sim.benches import memory
from speq.sim.benches.axi import expected_bursts
from tests.hw.verilog_tools import lint, write_unit, yosys

CONFIGS = {
    "narrow, long bursts": AxiConfig(data_bits=64, address_bits=64, burst=256, depth=512),
    "wide": AxiConfig(data_bits=1024, address_bits=40, burst=256, outstanding=13, depth=64),
    "smallest": AxiConfig(data_bits=64, address_bits=16, burst=1, outstanding=2, depth=2),
}
UNITS = {"speq_memory_reader": MemoryReader, "speq_memory_writer": MemoryWriter}

each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@each_config
@pytest.mark.parametrize("name", UNITS)
def test_verilator_lints_it_without_a_warning(name: str, config: AxiConfig, tmp_path: Path) -> None:
    source = write_unit(UNITS[name](config), name, tmp_path)
    assert lint(name, source) == (0, "")


def test_yosys_synthesises_them_without_latches_and_with_their_rams(tmp_path: Path) -> None:
    """One for data; a reader another for the addresses of its bursts."""
    script = ""
    for name, unit in UNITS.items():
        write_unit(unit(AxiConfig(data_bits=64, outstanding=4, depth=32)), name, tmp_path)
        script += (
            f"design -reset; read_verilog {name}.v; blackbox speq_ram; "
            f"synth -flatten -noabc -top {name}; check -assert; "
            "select -assert-none t:$_DLATCH*; select -assert-any t:$_DFF*; "
            f"select -assert-count {1 + (unit is MemoryReader)} t:*speq_ram*; "
        )
    yosys(tmp_path, script)


@each_config
def test_ports_have_the_names_and_widths_of_axi4(config: AxiConfig) -> None:
    def widths(signature: wiring.Signature) -> dict[str, int]:
        return {"_".join(map(str, p)): len(v) for p, _, v in signature.flatten(signature.create())}

    address = {"id": ID_BITS, "addr": config.address_bits, "len": 8, "size": 3, "burst": 2}
    address |= {"cache": 4, "prot": 3, "valid": 1, "ready": 1}
    size = config.data_bits
    assert widths(config.read_signature) == {
        **{f"ar{name}": width for name, width in address.items()},
        **{"rid": ID_BITS, "rdata": size, "rresp": 2, "rlast": 1, "rvalid": 1, "rready": 1},
    }
    assert widths(config.write_signature) == {
        **{f"aw{name}": width for name, width in address.items()},
        **{"wdata": size, "wstrb": size // 8, "wlast": 1, "wvalid": 1, "wready": 1},
        **{"bid": ID_BITS, "bresp": 2, "bvalid": 1, "bready": 1},
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data_bits", 32),
        ("data_bits", 96),
        ("data_bits", 2048),
        ("address_bits", 15),
        ("address_bits", 65),
        ("burst", 0),
        ("burst", 24),
        ("burst", 512),
        ("outstanding", 1),
        ("outstanding", 65),
        ("depth", 8),
        ("depth", 100),
        ("depth", 64.0),
    ],
)
def test_bad_parameters_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is {re.escape(repr(value))}; allowed are "):
        AxiConfig(**{name: value})


def test_the_buffer_need_not_hold_more_than_a_page() -> None:
    assert AxiConfig(data_bits=1024, burst=256, depth=32).burst_beats == 32


@pytest.mark.parametrize("depth", [0, 1, 3, 12])
def test_a_fifo_of_another_depth_is_refused(depth: int) -> None:
    RamFifo._MustUse__silence = True  # else Amaranth warns that it is never elaborated
    with pytest.raises(ValueError, match=f"depth is {depth}"):
        RamFifo(8, depth)


def test_readers_and_writers() -> None:
    memory.run()


def test_expected_bursts() -> None:
    config = AxiConfig(data_bits=64, burst=16)
    commands = [(0x10F0, 20), (0x2000, 16), (0x3FF8, 1)]
    assert expected_bursts(config, commands) == [
        (0x10F0, 2),
        (0x1100, 16),
        (0x1180, 2),
        (0x2000, 16),
        (0x3FF8, 1),
    ]
