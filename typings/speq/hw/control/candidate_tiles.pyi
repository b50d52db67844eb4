from hw.control.candidate_tiles import *
