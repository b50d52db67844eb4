from hw.accelerator_config import *
