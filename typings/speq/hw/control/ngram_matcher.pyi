from hw.control.ngram_matcher import *
