from hw.memory.activation_reader import *
