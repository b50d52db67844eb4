from hw.datapath import *
