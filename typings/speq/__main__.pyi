from api.__main__ import *
