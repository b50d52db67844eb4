from hw.vector.beat_widener import *
