from hw.memory.repeater import *
