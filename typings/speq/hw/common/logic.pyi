from hw.common.logic import *
