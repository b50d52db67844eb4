from hw.accelerator import *
