from host.image_file import *
