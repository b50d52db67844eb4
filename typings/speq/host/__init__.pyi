from host import *
