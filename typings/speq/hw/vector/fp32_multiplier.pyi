from hw.vector.fp32_multiplier import *
