from host.accelerator_model import *
