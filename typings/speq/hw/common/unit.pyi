from hw.common.unit import *
