from host.layouts import *
