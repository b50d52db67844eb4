from hw.memory.burst_splitter import *
