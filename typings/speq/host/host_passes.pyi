from host.host_passes import *
