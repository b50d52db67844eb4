from hw.engine_config import *
