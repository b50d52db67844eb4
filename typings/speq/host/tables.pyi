from host.tables import *
