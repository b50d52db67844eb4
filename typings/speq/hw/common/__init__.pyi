from hw.common import *
