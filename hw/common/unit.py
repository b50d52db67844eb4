# SPDX-License-Identifier: Apache-2.0
"""Units that are elaborated once and instantiated many times.

Amaranth elaborates every submodule anew, so an array of identical PEs would appear as often in
the Verilog as it has PEs. A `Unit` stands for a component whose Verilog module is written once
under a name of its own; it elaborates to an instance of that module.
"""

from __future__ import annotations

from amaranth.hdl import ClockSignal, Elaboratable, Instance, Shape
from amaranth.lib import wiring
from amaranth.lib.wiring import Flow


class Unit(wiring.Component):
    """An instance of the Verilog module `module` that `component` is written as.

    It has the members of `component`. All its sequential logic, if any, is in the domain "sync"
    and needs no reset.

    Parameters
    ----------
    module : str
        Name of the Verilog module.
    component : wiring.Component
        The unit itself; it must be written to the same Verilog file under that name.
    clocked : bool
        Whether the unit has sequential logic.
    flat : bool
        The members, none of them an interface, have no fields: those of many instances would make
        up most of the Verilog.
    """

    def __init__(
        self,
        module: str,
        component: wiring.Component,
        *,
        clocked: bool = True,
        flat: bool = False,
    ) -> None:
        self.module = module
        self.clocked = clocked
        members = dict(component.signature.members)
        if flat:
            members = {
                name: member.flow(Shape.cast(member.shape)) for name, member in members.items()
            }
        super().__init__(members)

    def elaborate(self, platform: object) -> Elaboratable:
        ports = [
            ("i" if member.flow is Flow.In else "o", "__".join(map(str, path)), value)
            for path, member, value in self.signature.flatten(self)
        ]
        if self.clocked:
            ports.append(("i", "clk", ClockSignal()))
        return Instance(self.module, *ports)
