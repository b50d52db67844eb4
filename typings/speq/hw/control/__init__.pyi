from hw.control import *
