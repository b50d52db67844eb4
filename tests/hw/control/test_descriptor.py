# SPDX-License-Identifier: Apache-2.0
"""Descriptors in memory, and the table of what their kinds use."""

from __future__ import annotations

from dataclasses import fields

import pytest

from speq.hw.control.descriptor import DESCRIPTOR, FORMS, Descriptor, DescriptorKind, unpack
from speq.hw.engine_config import Mode

NAMES = {field.name for field in fields(Descriptor)}


def test_the_table_names_fields_that_there_are() -> None:
    assert set(FORMS) == set(DescriptorKind)
    members = {name for name, _ in DESCRIPTOR}
    for form in FORMS.values():
        assert set(form.uses) <= members - {"kind"}
        assert {use.name or member for member, use in form.uses.items()} <= NAMES
    assert FORMS[DescriptorKind.ARGMAX].uses["extra"].name == "ranking"
    assert FORMS[DescriptorKind.ATTENTION].uses["extra"].name == "stride"


def test_ranking_and_stride_share_their_place() -> None:
    argmax = Descriptor(DescriptorKind.ARGMAX, Mode.DRAFT, ranking=0x1240)
    attention = Descriptor(DescriptorKind.ATTENTION, stride=0x1240)
    for descriptor in (argmax, attention):
        content = descriptor.pack()
        assert unpack(content)["extra"] == 0x1240
        assert content[56:] == (0x1240).to_bytes(8, "little")
    with pytest.raises(ValueError, match="either a ranking or a stride"):
        Descriptor(DescriptorKind.ARGMAX, ranking=64, stride=64).pack()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="sharing is 256; a descriptor holds 8 bits of it"):
        Descriptor(DescriptorKind.ATTENTION, sharing=256).pack()
    with pytest.raises(ValueError, match="a descriptor has 64 bytes, not 63"):
        unpack(bytes(63))
