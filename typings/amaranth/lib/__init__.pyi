# Stands beside enum.pyi, so that `from amaranth.lib import data, enum` finds both: all modules but
# `enum` are of unknown type.
from typing import Any

def __getattr__(name: str) -> Any: ...
