from host.image import *
