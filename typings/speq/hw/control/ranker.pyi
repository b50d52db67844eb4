from hw.control.ranker import *
