# Amaranth's enumerations are Python's with a shape; all that a checker must be told of Amaranth.
from enum import Enum as _Enum

from amaranth.hdl import Shape

class Enum(_Enum):
    def __init_subclass__(cls, *, shape: Shape) -> None: ...
