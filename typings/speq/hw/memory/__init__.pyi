from hw.memory import *
