from host.layout import *
