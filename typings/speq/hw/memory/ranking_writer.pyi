from hw.memory.ranking_writer import *
