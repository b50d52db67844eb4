from host.session import *
