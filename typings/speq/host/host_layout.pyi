from host.host_layout import *
