from host.driver import *
