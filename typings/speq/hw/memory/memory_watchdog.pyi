from hw.memory.memory_watchdog import *
