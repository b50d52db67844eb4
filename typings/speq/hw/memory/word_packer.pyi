from hw.memory.word_packer import *
