from hw.vector.word_counter import *
