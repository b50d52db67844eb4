from host.places import *
