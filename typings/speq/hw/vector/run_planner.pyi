from hw.vector.run_planner import *
